"""Networks from torchvision, timm and one's own functions: their taps, their training, their state, and what is refused."""

import importlib
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pupil import checkpoint, checks, models
from pupil import settings as settings_of
from pupil.assemble import build_method
from pupil.fit import activate, refuse_batch_of_one, step, teacher_features
from pupil.inspection import check
from pupil.methods import METHODS
from pupil.methods.alone import Alone
from pupil.models import external
from pupil.models.external import unwatched
from pupil.models.taps import External, native_state
from pupil.net import FrozenLinear, Net, probe
from pupil.optim import Optim, make_optimizer
from pupil.types import Batch, UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:::timm.*"),
    pytest.mark.filterwarnings("ignore:::torch.(_dynamo|fx|_functorch|jit).*"),
]
K, SIZE = 5, 32
ROOT = Path(__file__).resolve().parents[1]

OWN = '''
import torch, torch.nn.functional as F
from torch import nn
from pupil.models.resnet import resnet8

class Tiny(nn.Module):
    """Strided blocks, functional ReLU and dropout, a linear layer on the mean."""
    def __init__(self, num_classes, drop=0.2):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(12, 16, 3, 2, 1)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("shift", torch.zeros(1))
        self.out, self.drop = nn.Linear(16, num_classes), drop
    def forward(self, x):
        x = F.relu(self.a(x))
        x = F.relu(self.b(x)) * self.scale + self.shift
        x = F.relu(self.c(x), inplace=True)
        return self.out(F.dropout(x.mean((2, 3)), self.drop, self.training))

class Choosy(nn.Module):
    """Its middle depends on the data: torch.fx calls it as it is."""
    def __init__(self): super().__init__(); self.conv = nn.Conv2d(8, 8, 3, 2, 1)
    def forward(self, x): return torch.relu(self.conv(x)) if x.sum() > -1e9 else x

def tiny(num_classes): return Tiny(num_classes)
def plain(num_classes): return Tiny(num_classes, 0.0)
def ours(num_classes): return resnet8(num_classes)
def choosy(num_classes):
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), Choosy(), pool, nn.Linear(8, num_classes))
def flat(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16), nn.ReLU(), nn.Linear(16, num_classes))
def no_bias(num_classes):
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU())
    return nn.Sequential(stem, nn.Conv2d(8, 64, 3, 2, 1), nn.ReLU(), pool, nn.Linear(64, num_classes, bias=False))
def to_one_pixel(num_classes):
    layers = [nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, num_classes)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), *layers)
def squeezenet(num_classes):
    import torchvision
    features = torchvision.models.squeezenet1_1().features
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes))
def text(num_classes): return "no network"
def no_argument(): return Tiny(3)
def wrong_width(num_classes): return Tiny(num_classes + 1)
def maps_only(num_classes): return nn.Conv2d(3, num_classes, 1)
def soft(num_classes): return nn.Sequential(Tiny(num_classes), nn.Softmax(1))
def branching(num_classes):
    class Net(Tiny):
        def forward(self, x): return super().forward(x) if x.mean() > -1e9 else x
    return Net(num_classes)
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a file and a package of one's own."""
    monkeypatch.chdir(tmp_path)
    for path in ("nets/mine.py", "ownpackage/nets.py"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(OWN)
    (tmp_path / "nets/broken.py").write_text("import no_such_package_here\n")
    for name in [n for n in sys.modules if n.split(".")[0] == "ownpackage"]:
        del sys.modules[name]
    importlib.invalidate_caches()
    return tmp_path


def build(name: str, size: int = SIZE) -> Net:
    torch.manual_seed(0)
    return models.build(name, K, size)


# --- taps -----------------------------------------------------------------------------------------------------------------

SHAPES = {  # at 32 pixels: stem, stages, embedding; whether the classifier sees the mean of the last map
    "torchvision/resnet18": ("64x16x16 64x8x8 128x4x4 256x2x2 512x1x1 512", True),
    "torchvision/mobilenet_v3_small": ("16x16x16 16x8x8 24x4x4 48x2x2 576x1x1 1024", False),
    "torchvision/shufflenet_v2_x0_5": ("24x16x16 24x8x8 48x4x4 96x2x2 1024x1x1 1024", True),
    "timm/test_convnext": ("24x8x8 24x8x8 32x4x4 48x2x2 64x1x1 64", False),
    "timm/test_vit": ("64x2x2 64x2x2 64x2x2 64x2x2 64", False),
    "timm/mobilenetv3_small_050": ("16x16x16 8x8x8 16x4x4 24x2x2 288x1x1 1024", False),
    "timm/mixer_s32_224": ("3x32x32 512", True),
    "nets/mine.py:tiny": ("8x32x32 12x16x16 16x8x8 16", True),
    "ownpackage.nets:tiny": ("8x32x32 12x16x16 16x8x8 16", True),
    "nets/mine.py:choosy": ("8x32x32 8x16x16 8", True),
    "nets/mine.py:flat": ("3x32x32 16", True),
    "nets/mine.py:squeezenet": ("64x15x15 128x7x7 256x3x3 512x1x1 512", True),
    "nets/mine.py:no_bias": ("8x32x32 64x16x16 64", True),
    "nets/mine.py:ours": ("16x32x32 16x32x32 32x16x16 64x8x8 64", True),
}
every_name = pytest.mark.parametrize("name", SHAPES)


@every_name
def test_taps_are_found_and_are_what_they_are_called(name: str) -> None:
    net, (shapes, pools) = build(name), SHAPES[name]
    assert " ".join("x".join(map(str, tap.shape[1:])) for tap in probe(net, SIZE).taps) == shapes
    assert net.pools_last is pools
    x = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        f = net.eval().features(x)
        assert torch.equal(net(x), f.logits)
        assert torch.equal(net.head(f.embedding), f.logits)
    assert isinstance(net.head, nn.Linear)
    assert f.last.shape[0] == 2
    for pre, tap in zip(f.pre, f.maps, strict=True):
        assert torch.equal(pre.relu(), tap) or torch.equal(pre, tap)
    if pools:
        assert torch.allclose(f.last.mean((2, 3)), f.embedding, atol=1e-5)
    if isinstance(net, External):
        assert len(net.found) == len(f.taps)


@every_name
def test_every_parameter_gets_a_gradient_and_another_head_takes_effect(name: str) -> None:
    net, x = build(name), torch.randn(4, 3, SIZE, SIZE)
    net.features(x).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    net.eval().head = FrozenLinear(net.head.weight.shape[1], K)  # type: ignore[index,union-attr]
    assert torch.equal(net(x), torch.zeros(4, K)), "its weights are zero"


@every_name
def test_state_has_native_keys_and_one_seed_gives_one_network(name: str, folder: Path) -> None:
    net = build(name)
    other = build(name)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))
    if not isinstance(net, External):
        return
    native, x = plain_network(name), torch.randn(2, 3, SIZE, SIZE)
    native.load_state_dict(native_state(net), strict=True)
    with torch.no_grad():
        assert torch.allclose(native.eval()(x), net.eval()(x), atol=1e-5)


def plain_network(name: str) -> Any:
    """Without this package."""
    place, _, model = name.partition("/")
    if place == "torchvision":
        return importlib.import_module("torchvision").models.get_model(model, num_classes=K)
    if place == "timm":
        fixed = {"img_size": SIZE} if model in ("test_vit", "mixer_s32_224") else {}
        return importlib.import_module("timm").create_model(model, num_classes=K, **fixed)
    scope: dict[str, Any] = {}
    exec(OWN, scope)
    return scope[name.partition(":")[2]](K)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/test_vit", "timm/test_convnext", "nets/mine.py:tiny"])
def test_features_compile_as_one_graph_and_give_the_same(name: str) -> None:
    net, x = build(name).eval(), torch.randn(2, 3, SIZE, SIZE)
    compiled = torch.compile(net.features, fullgraph=True, backend="eager")
    with torch.no_grad():
        for a, b in zip(net.features(x).taps, compiled(x).taps, strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    torch._dynamo.reset()


def test_dropout_follows_the_mode() -> None:
    net, x = build("nets/mine.py:tiny"), torch.randn(8, 3, SIZE, SIZE)
    assert not torch.equal(net.train()(x), net(x))
    assert torch.equal(net.eval()(x), net(x))


# --- use ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["thkd", "simkd"])
@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/test_vit", "nets/mine.py:tiny"])
def test_a_student_comes_back_from_its_checkpoint(name: str, method: str, tmp_path: Path) -> None:
    teacher = build(name).eval().requires_grad_(False)
    hp = METHODS[method].Config(**({"mix": 0.3} if method == "thkd" else {}))
    if not teacher.pools_last:
        teacher = build("resnet8").eval().requires_grad_(False)  # 64 wide, as timm/test_vit
    built = build_method(method, build(name), teacher, SIZE, torch.arange(8) % K, hp, 0)
    meta = {"network": name, "method": method, "surgery": built.surgery, "classes": list("abcde"), "image_size": SIZE}
    checkpoint.save(tmp_path / "m", built.student.state_dict(), {**meta, "mean": [0.5] * 3, "std": [0.5] * 3})
    again, _ = checkpoint.load(tmp_path / "m")
    x = torch.randn(2, 3, SIZE, SIZE)
    assert torch.equal(again(x), built.student.eval()(x))


def test_check_prints_the_taps(capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_of.Settings(teachers=("torchvision/resnet18",), students=("resnet8",), prepared="nowhere")
    checks.check(settings)
    check(settings)
    said = capsys.readouterr().out
    assert "taps (stem, stages, embedding): 64x16x16  64x8x8  128x4x4  256x2x2  512x1x1  512" in said
    assert "outputs of the modules: relu  layer1.1.relu  layer2.1.relu  layer3.1.relu  layer4.1.relu  flatten" in said


def test_check_says_that_dvc_does_not_see_a_file_outside_networks(folder: Path) -> None:
    assert unwatched("nets/mine.py:tiny") == "dvc does not see changes of nets/mine.py: move it to networks/"
    own = Path(external.HOME) / "networks"
    assert own.is_dir()
    assert unwatched("torchvision/resnet18") is unwatched("resnet8") is unwatched("ownpackage.nets:tiny") is None


def test_a_file_in_networks_is_watched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "HOME", folder)
    (folder / "nets").rename(folder / "networks")
    assert unwatched("networks/mine.py:tiny") is None


@pytest.mark.parametrize("method", ["simkd", "thkd"])
def test_a_classifier_without_bias_is_lent_with_a_bias_of_zero(method: str) -> None:
    teacher = build("nets/mine.py:no_bias").eval().requires_grad_(False)
    hp = METHODS[method].Config(**({"mix": 1.0} if method == "thkd" else {}))
    built = build_method(method, build("resnet8"), teacher, SIZE, torch.arange(8) % K, hp, 0)
    lent = built.student.head if method == "simkd" else built.student.teacher_head
    assert isinstance(lent, FrozenLinear)
    assert torch.equal(lent.weight, teacher.head.weight)  # type: ignore[arg-type]
    assert torch.equal(lent.bias, torch.zeros(K))


@pytest.mark.parametrize(("images", "batch_size", "fits"), [(33, 16, 17), (40, 1, 2), (9, 4, 5)])
def test_a_batch_of_one_image_is_refused_where_batch_norm_cannot_train_on_it(images: int, batch_size: int, fits: int) -> None:
    net = build("nets/mine.py:to_one_pixel")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    stream = torch.get_rng_state()
    with pytest.raises(UserError) as e:
        refuse_batch_of_one(Alone(net), None, images, SIZE, batch_size, "optim.batch_size")
    assert str(e.value).startswith(f"optim.batch_size={batch_size} leaves a batch of one of the {images} training images")
    assert str(e.value).endswith(f"use optim.batch_size={fits}")
    assert images % fits != 1
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)
    refuse_batch_of_one(Alone(net), None, images, SIZE, fits, "optim.batch_size")
    refuse_batch_of_one(Alone(build("resnet8")), None, images, SIZE, batch_size, "optim.batch_size")


# --- refusals: one line each ----------------------------------------------------------------------------------------------

NAMES = [
    ("torchvision/resnet19", "there is no 'torchvision/resnet19'; did you mean 'torchvision/resnet18'?"),
    ("timm/convnext_ato", "did you mean 'timm/convnext_atto'?"),
    ("nets/mine.py:tini", "nets/mine.py has no function 'tini'; did you mean 'tiny'?"),
    ("nets/yours.py:tiny", "there is no file 'nets/yours.py'"),
    ("nets/broken.py:tiny", "nets/broken.py cannot be imported: ModuleNotFoundError: No module named 'no_such_package_here'"),
    ("ownpackage.net:tiny", "ownpackage.net cannot be imported: ModuleNotFoundError"),
    ("resnet9", "there is no 'resnet9'; did you mean 'resnet"),
]
NETWORKS = [
    ("nets/mine.py:text", "must return an nn.Module, got str"),
    ("nets/mine.py:no_argument", "cannot be called with the number of classes, 5: TypeError"),
    ("nets/mine.py:wrong_width", "must give logits (B, 5) for (B, 3, H, W) images; for two images it gave shape (2, 6)"),
    ("nets/mine.py:maps_only", "for two images it gave shape (2, 5, 32, 32)"),
    ("nets/mine.py:soft", "must end in one linear layer, its classifier of 5 classes; it ends in 1"),
    ("nets/mine.py:branching", "cannot be traced by torch.fx"),
    ("torchvision/squeezenet1_1", "after a convolution of 5 channels; wrap it in a function of your own that pools, flattens"),
    ("timm/efficientformer_l1", "timm/efficientformer_l1 cannot take images of 32 pixels"),
    ("timm/vit_tiny_patch16_224", "cannot take images of 8 pixels"),
]


@pytest.mark.parametrize(("name", "said"), NAMES)
@pytest.mark.parametrize("key", ["teachers", "students", "shkd"])
def test_a_wrong_name_is_one_line(name: str, said: str, key: str) -> None:
    with pytest.raises(UserError) as e:
        checks.check(settings_of.Settings(**{key: (name,)}))
    assert said in str(e.value)
    assert str(e.value).startswith(f"{key}: ")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("name", "said"), NETWORKS)
def test_a_network_that_does_not_fit_is_one_line(name: str, said: str) -> None:
    with pytest.raises(UserError) as e:
        build(name, 8 if "8 pixels" in said else SIZE)
    assert said in str(e.value)
    assert name in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_library_that_is_not_installed_is_one_line(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", lacking)
    with pytest.raises(UserError, match=f"need {library}, which is not installed: pip install {library}"):
        models.check(f"{library}/resnet18")


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("method", ["fitnet", "simkd"])
def test_a_method_that_needs_maps_says_who_has_none(method: str, role: str) -> None:
    flat, ours = build("nets/mine.py:flat"), build("resnet8")
    pair = (flat, ours) if role == "student" else (ours, flat)
    with pytest.raises(UserError) as e:
        build_method(method, *pair, SIZE, torch.arange(8) % K, METHODS[method].Config(), 0)
    assert f"{method} needs feature maps, and the {role} nets/mine.py:flat gives none" in str(e.value)


def test_simkd_says_that_a_classifier_with_layers_before_it_cannot_be_reused() -> None:
    with pytest.raises(UserError, match="must see the mean of its last map; that of timm/test_convnext"):
        build_method(
            "simkd", build("resnet8"), build("timm/test_convnext"), SIZE, torch.arange(8), METHODS["simkd"].Config(), 0
        )


def test_neither_library_is_imported_before_it_is_asked_for() -> None:
    code = "import sys; sys.path.insert(0, 'src'); import pupil.checkpoint; print({'timm', 'torchvision'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "set()", done.stderr


# --- thirty pairs ---------------------------------------------------------------------------------------------------------

POOL = [
    *("resnet8", "resnet14", "wrn_16_1", "vgg8"),
    *("torchvision/resnet18", "torchvision/mobilenet_v3_small", "torchvision/shufflenet_v2_x0_5", "torchvision/mnasnet0_5"),
    *("torchvision/regnet_y_400mf", "torchvision/squeezenet1_1"),
    *("timm/test_resnet", "timm/test_convnext", "timm/test_vit", "timm/mobilenetv3_small_050", "timm/lcnet_035"),
    *("timm/mixer_s32_224", "timm/test_efficientnet", "timm/ghostnet_050", "timm/mobilevit_xxs", "timm/regnetx_002"),
    *("nets/mine.py:tiny", "nets/mine.py:choosy", "ownpackage.nets:plain", "nets/mine.py:ours"),
]
POOL.remove("torchvision/squeezenet1_1")  # no linear classifier: refused above


@pytest.mark.slow
def test_thirty_random_pairs_train_two_steps(folder: Path) -> None:
    draw, used = random.Random(0), set()
    for _ in range(30):
        t_name, s_name, methods = draw.choice(POOL), draw.choice(POOL), draw.sample(sorted(METHODS), len(METHODS))
        method = fitting(t_name, s_name, methods)
        used.add(type(method).__name__)
        images, strong = torch.randn(2, 6, 3, SIZE, SIZE)
        batch = Batch(images, torch.arange(6) % K, torch.arange(6), strong=strong)
        before: list[Tensor] = [p.detach().clone() for p in method.student.parameters()]
        for phase in method.phases():
            if phase.before is not None:
                phase.before([batch])
            activate(method, phase)
            optimizer, _ = make_optimizer(phase, Optim(lr=1e-3))
            for _ in range(2):
                terms = step(method, teacher_features(method.teacher, batch), batch, phase, optimizer)
                where = f"{s_name} by {type(method).__name__} from {t_name}"
                assert all(term.raw.isfinite() for term in terms.values()), where
            assert all(p.grad is not None for p in method.parameters() if p.requires_grad), where
        assert any(not torch.equal(a, b) for a, b in zip(before, method.student.parameters(), strict=True)), where
    assert len(used) >= 4


def fitting(t_name: str, s_name: str, methods: list[str]) -> Any:
    """The first method that the pair allows."""
    refused = []
    for name in methods:
        teacher = build(t_name).eval().requires_grad_(False)
        hp = METHODS[name].Config(**({"k": 8, "dim": 8} if name == "crd" else {"hint": 1} if name == "fitnet" else {}))
        try:
            return build_method(name, build(s_name), teacher, SIZE, torch.arange(20) % K, hp, 0)
        except UserError as e:
            refused.append(str(e))
    raise AssertionError(f"no method fits {s_name} and {t_name}: {refused}")
