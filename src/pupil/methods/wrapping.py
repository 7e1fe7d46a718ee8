"""What methods that wrap another one have in common."""

from dataclasses import dataclass, replace

from pupil.methods.base import Method, Setup
from pupil.types import Term, Terms, UserError


@dataclass(frozen=True)
class Wrapper(Method.Config):
    """ce and beta multiply the wrapped method's weights."""

    ce: float = 1.0  # times the wrapped method's weight of cross-entropy
    kl: float = 0.0  # must be 0: the wrapped method has its own
    beta: float = 1.0  # times the wrapped method's other weights
    of: str = "kd"  # the wrapped method
    of_preset: str = ""  # of the wrapped method; "": the one called like the wrapper, if there is one


def known(key: str, name: str) -> type[Method]:
    """The method that the setting `key` names."""
    from pupil.methods import METHODS

    if name not in METHODS:
        raise UserError(f"{key}: there is no method {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name]


def settings_of(key: str, name: str, preset: str) -> Method.Config:
    """Its settings, by the preset that the setting `key`_preset names."""
    presets = {"default": {}, **known(key, name).presets}
    if preset not in presets:
        raise UserError(f"{key}_preset: {name} has no preset {preset!r}; known: {', '.join(presets)}")
    return replace(known(key, name).Config(), **presets[preset])


def wrap(name: str, setup: Setup, hp: Wrapper, suite: str = "", several_phases: bool = False) -> Method:
    """The wrapped method, around the same student.  It must deploy the plain student, and train in one phase unless
    `several_phases`.  `suite`: the preset it is taken with, if it has it; by default the one called `name`.
    """
    method = known(f"hp.{name}.of", hp.of)
    if issubclass(method.Config, Wrapper) and (name, hp.of) != ("ctkd", "ls"):
        hint = "the other way round is possible: hp.ctkd.of=ls" if hp.of == "ctkd" else "it is a wrapper itself"
        raise UserError(f"hp.{name}.of: {name} cannot wrap {hp.of}; {hint}")
    if hp.kl:
        raise UserError(f"hp.{name}.kl must be 0, got {hp.kl}: the wrapped method brings its own; weigh it by beta")
    suite = suite or name
    preset = hp.of_preset or (suite if suite in method.presets else "default")
    inner = method(setup, settings_of(f"hp.{name}.of", hp.of, preset))
    if inner.surgery or (len(inner.phases()) > 1 and not several_phases):
        why = "deploys more than the student" if inner.surgery else "trains in several phases"
        others = "at or crd" if several_phases else "kd or dkd"
        raise UserError(f"hp.{name}.of: {name} cannot wrap {hp.of}, which {why}; use {others}")
    return inner


def weighed(terms: Terms, hp: Wrapper) -> Terms:
    """A wrapped method's terms, their weights times the wrapper's."""
    return {n: Term(term.raw, (hp.ce if n.startswith("ce") else hp.beta) * term.weight) for n, term in terms.items()}
