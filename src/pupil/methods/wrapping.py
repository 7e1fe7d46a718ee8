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


def wrap(name: str, setup: Setup, hp: Wrapper) -> Method:
    """The wrapped method, around the same student.  It must deploy the plain student and train in one phase."""
    from pupil.methods import METHODS

    if hp.of not in METHODS:
        raise UserError(f"hp.{name}.of: there is no method {hp.of!r}; known: {', '.join(METHODS)}")
    method = METHODS[hp.of]
    if hp.of == name or (name == "ls" and issubclass(method.Config, Wrapper)):
        raise UserError(f"hp.{name}.of: {name} cannot wrap {hp.of}; the other way round is possible: hp.ctkd.of=ls")
    if hp.kl:
        raise UserError(f"hp.{name}.kl must be 0, got {hp.kl}: the wrapped method brings its own; weigh it by beta")
    preset = hp.of_preset or (name if name in method.presets else "default")
    if preset not in (known := {"default": {}, **method.presets}):
        raise UserError(f"hp.{name}.of_preset: {hp.of} has no preset {preset!r}; known: {', '.join(known)}")
    inner = method(setup, replace(method.Config(), **known[preset]))
    if inner.surgery or len(inner.phases()) > 1:
        why = "trains in several phases" if len(inner.phases()) > 1 else "deploys more than the student"
        raise UserError(f"hp.{name}.of: {name} cannot wrap {hp.of}, which {why}; use kd or dkd")
    return inner


def weighed(terms: Terms, hp: Wrapper) -> Terms:
    """A wrapped method's terms, their weights times the wrapper's."""
    return {n: Term(term.raw, (hp.ce if n.startswith("ce") else hp.beta) * term.weight) for n, term in terms.items()}
