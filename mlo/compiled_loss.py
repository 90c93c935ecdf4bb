"""A problem's loss and its derivatives as one graph that `torch.compile` has made."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Hashable, Mapping
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlo.errors import MloWarning
from mlo.vectors import Vector

Found = tuple[Tensor | None, ...]

# torch's switch for tracing a reverse pass together with the forward pass that it goes back through.
_SWITCH = "trace_autograd_ops"

# How torch is to trace; by default it does not look whether a module has got hooks since.
_SETTINGS = {_SWITCH: True, "skip_nnmodule_hook_guards": False}


class Derivatives(NamedTuple):
    """Which derivatives of a loss L are wanted.

    Attributes:
        at: the tensors in which the gradient is.
        mixed_at: x, if it is not the gradient that is wanted but vᵀ ∂²L/∂at∂x.
        vector: v.
        gradient_too: whether it is both.
        shifted: parameters that the loss sees, if the difference of two gradients is wanted: at their values less at
            their reflection in `centre`, which they have afterwards. The loss there comes after the difference.
        centre: see there.

    """

    at: Vector
    mixed_at: Vector = ()
    vector: Vector = ()
    gradient_too: bool = False
    shifted: Vector = ()
    centre: Vector = ()


class CompiledLoss:
    """The loss of one problem with its derivatives, as compiled functions.

    `torch.compile` by itself makes a graph of the forward pass and another one of the reverse pass, between which
    autograd keeps what the second needs, and none of a second derivative. One graph of all passes takes no autograd
    when it runs, and forms nothing that the result does not need. It is compiled anew for what makes it another
    function: shapes, training mode, which tensors need a gradient.

    Attributes:
        failure: why it cannot be compiled, `None` as long as torch could.
        both_sides: whether both sides of a difference may be one function, as far as is known.
        graphs: how many were compiled.

    """

    def __init__(self, title: str, options: Mapping[str, Any]) -> None:
        """Prepare; nothing is compiled before the first call. Warnings call the loss by its `title`."""
        self.failure: str | None = None
        self.both_sides, self.graphs = True, 0
        self._title, self._options = title, options
        self._functions: dict[Hashable, Callable[..., tuple[Any, Found, bool]]] = {}
        failures = torch._dynamo.exc
        self._failures = (failures.TorchDynamoException, failures.FailOnRecompileLimitHit)

    def __call__(self, function: Callable[[Any], Any], batch: Any, derivatives: Derivatives) -> tuple[Any, Found, bool]:
        """Return what `function(batch)` returns, without a graph, derivatives of the loss, and whether it has any.

        Of two derivatives, they come one after the other; `None` stands for what the loss does not reach.

        Raises:
            CannotCompileError: nothing was evaluated. If `function` itself is not at fault, say `give_up`.

        """
        # One function for all of them would be compiled for any shape once it was called with a second one.
        shapes = tuple([t.shape for t in derivatives.at]), tuple([t.shape for t in derivatives.mixed_at])
        kind = *shapes, bool(derivatives.shifted)
        compiled = self._functions.get(kind)
        if compiled is None:
            compiled = self._functions[kind] = _compiled(_derivatives, self._options, self._count)
        config: Any = torch._dynamo.config
        before = [getattr(config, name) for name in _SETTINGS]
        for name, value in _SETTINGS.items():
            setattr(config, name, value)
        try:
            return compiled(function, batch, *derivatives)
        except self._failures as error:
            raise CannotCompileError(_reason(error)) from error
        finally:
            for name, value in zip(_SETTINGS, before, strict=True):
                setattr(config, name, value)

    def _count(self) -> None:
        self.graphs += 1

    def give_up(self, error: CannotCompileError) -> None:
        """Warn that the loss is evaluated as it is from here on, and why."""
        self.failure = f"{self._title} and its derivatives cannot be compiled as one function. {error}"
        warnings.warn(
            f"{self._title} and its derivatives cannot be compiled as one function; they are run as they are from here "
            f"on. Change what torch.compile objects to, or leave compile= out. {error}",
            MloWarning,
            stacklevel=2,
        )


class CannotCompileError(Exception):
    """What torch objects to."""


def _reason(error: Exception) -> str:
    """Return the beginning of what torch says, what a compiler objects to first, and the place that is named last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:3])[:_LONGEST]
    objections = [line[-_LONGEST:] for line in lines[3:] if "error: " in line]
    places = [line for line in lines if line.startswith("File ")]
    return "; ".join([f"{type(error).__name__}: {said}", *objections[:1], *places[-1:]])


_LONGEST = 300


def _compiled(
    function: Any, options: Mapping[str, Any], compiles: Callable[[], None]
) -> Callable[..., tuple[Any, Found, bool]]:
    """Return a copy that is compiled for what it is called with; `compiles` is called each time.

    It is a copy since torch keeps what it knows of shapes, and a few variants, for each name and code.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_COPIES)}")
    arguments = {"backend": "inductor", **options, "fullgraph": True}
    backend = torch._dynamo.lookup_backend(arguments["backend"])
    settings: dict[str, Any] = {name: arguments.pop(name) for name in ("mode", "options") if name in arguments}
    if arguments["backend"] == "inductor":
        settings = {"config_patches": settings["options"]}

    def checked(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        _reject_second_derivatives_of_functions(graph)
        compiles()
        return backend(graph, inputs, **settings)

    return torch.compile(FunctionType(code, function.__globals__), **{**arguments, "backend": checked})


_COPIES = itertools.count()


def _reject_second_derivatives_of_functions(graph: torch.fx.GraphModule) -> None:
    """Raise an error for what torch gets wrong (2.13): the derivative of the backward of a `torch.autograd.Function`.

    It takes what that backward returns for a constant, once it has traced it.
    """
    graphs = [part.graph for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
    called = [str(node.target) for g in graphs for node in g.nodes if node.op == "call_function"]
    passes = sum(node.target is torch.autograd.grad for g in graphs for node in g.nodes)
    if passes > 1 and any("autograd_function_apply" in target for target in called):
        raise NotImplementedError("torch.compile has no second derivative of a torch.autograd.Function")


def _derivatives(
    function: Callable[[Any], Any],
    batch: Any,
    at: Vector,
    mixed_at: Vector,
    vector: Vector,
    gradient_too: bool,
    shifted: Vector,
    centre: Vector,
) -> tuple[Any, Found, bool]:
    result = function(batch)
    slopes = _slopes((_loss(result),), at, create_graph=bool(mixed_at))
    reached = any(t is not None for t in slopes)
    if shifted:
        with torch.no_grad():
            for t, c in zip(shifted, centre, strict=True):
                t.copy_(c + (c - t))
        other = _loss(function(batch))
        pairs = zip(slopes, _slopes((other,), at), strict=True)
        changes = [None if a is None or b is None else a - b for a, b in pairs]
        return _detached(result), (*changes, other.detach()), reached
    if not mixed_at:
        return _detached(result), slopes, reached
    mixed = _slopes(slopes, mixed_at, vector)
    if not gradient_too:
        return _detached(result), mixed, reached  # and none of what only the gradient needs is computed
    return _detached(result), (*[None if t is None else t.detach() for t in slopes], *mixed), reached


def _slopes(outputs: Found, at: Vector, vector: Vector | None = None, create_graph: bool = False) -> Found:
    """Return what `reverse_pass.gradients` does where all of `at` need one, in terms that torch.compile can trace."""
    live: list[Tensor] = []
    cotangents: list[Tensor] = []
    for i, output in enumerate(outputs):
        if output is not None and output.requires_grad:
            live.append(output)
            if vector is not None:
                cotangents.append(vector[i])
    if not live:
        return (None,) * len(at)
    return torch.autograd.grad(live, at, cotangents or None, create_graph=create_graph, allow_unused=True)


def _loss(result: Any) -> Tensor:
    return result["loss"] if isinstance(result, Mapping) else result  # type: ignore[no-any-return]


def _detached(result: Any) -> Any:
    if isinstance(result, Mapping):
        return {key: value.detach() if isinstance(value, Tensor) else value for key, value in result.items()}
    return result.detach()


def missing_support() -> str | None:
    """Return what was expected of torch if it cannot compile reverse passes, `None` if it can."""
    if hasattr(torch._dynamo.config, _SWITCH):
        return None
    return (
        f"a torch that can compile reverse passes (with torch._dynamo.config.{_SWITCH}, as 2.13); got torch "
        f"{torch.__version__}"
    )


def compile_options(given: bool | Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `torch.compile` for what a problem's option `compile` says.

    The random draws of compiled code are to be those of eager code, since a loss is evaluated by either.

    Raises:
        ValueError: there is no such argument, or not with this torch; the message says what was expected.

    """
    missing = missing_support()
    if missing is not None:
        raise ValueError(f"{missing}. Leave compile= out")
    arguments = {} if isinstance(given, bool) else dict(given)
    known = list(inspect.signature(torch.compile).parameters)[1:]
    unknown = [name for name in arguments if name not in known]
    if unknown:
        raise ValueError(f"arguments of torch.compile ({', '.join(known)}); got {', '.join(map(repr, unknown))}")
    if arguments.pop("fullgraph", True) is not True:
        raise ValueError("fullgraph=True (derivatives go through the whole loss); got fullgraph=False")
    try:
        if arguments.get("backend", "inductor") == "inductor":
            options = dict(arguments.get("options") or {})
            if arguments.get("mode") is not None:
                options = {**torch._inductor.list_mode_options(arguments.pop("mode")), **options}
            arguments["options"] = {"fallback_random": True, "triton.cudagraphs": False, **options}
        torch.compile(lambda: None, **arguments)
    except RuntimeError as error:
        raise ValueError(f"what torch.compile knows; got {given}: {str(error)[:200]}") from None
    if "cudagraphs" in str(arguments.get("backend")) or (arguments.get("options") or {}).get("triton.cudagraphs"):
        raise ValueError(
            "compiled code that leaves its results to the caller (CUDA graphs write the next ones over them, those of "
            "the other side of a difference); got a mode or backend with CUDA graphs. Use mode='default' or "
            "'max-autotune-no-cudagraphs'"
        )
    return arguments
