"""A problem's loss and its derivatives as one graph that `torch.compile` has made."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FunctionType
from typing import Any

import torch

from mlo.errors import MloWarning
from mlo.traced import Derivatives, Traced, UnfitLossError

# torch's switch for tracing a reverse pass together with the forward pass that it goes back through.
_SWITCH = "trace_autograd_ops"

# How torch is to trace. By default it does not look whether a module has got hooks since, and draws NumPy's random
# numbers itself; and it can be told to take parameters for constants.
_SETTINGS = {
    _SWITCH: True,
    "skip_nnmodule_hook_guards": False,
    "use_numpy_random_stream": True,
    "install_free_tensors": False,
}


class CompiledLoss:
    """The loss of one problem with its derivatives, as compiled functions.

    `torch.compile` by itself makes a graph of the forward pass and another one of the reverse pass, between which
    autograd keeps what the second needs, and none of a second derivative. One graph of all passes takes no autograd
    when it runs, and forms nothing that the result does not need. It is compiled anew for what makes it another
    function: shapes, training mode, which tensors need a gradient.

    Attributes:
        failure: why it cannot be compiled, `None` as long as torch could.

    """

    def __init__(self, title: str, options: Mapping[str, Any]) -> None:
        """Prepare; nothing is compiled before the first call. Warnings call the loss by its `title`."""
        self.failure: str | None = None
        self._title, self._options = title, options
        self._functions: dict[Hashable, Callable[..., Traced]] = {}
        failures = torch._dynamo.exc
        self._failures = (failures.TorchDynamoException, failures.FailOnRecompileLimitHit, UnfitLossError)

    def __call__(self, function: Callable[[Any], Any], batch: Any, derivatives: Derivatives) -> Traced:
        """Return what `function(batch)` returns, without a graph, derivatives of the loss, and whether it has any.

        Raises:
            CannotCompileError: nothing was evaluated. If `function` itself is not at fault, say `give_up`.

        """
        compiled = self._functions.get(derivatives.kind)
        if compiled is not None and not getattr(torch._dynamo.config, _SWITCH):
            # The settings are for tracing, and take a tenth of the time of a small function to set. Without them what
            # has to be traced anew is refused.
            with suppress(*self._failures):
                return compiled(function, batch, *derivatives.arguments)
        if compiled is None:
            compiled = _compiled(derivatives.traced, self._options)
            self._functions[derivatives.kind] = compiled
        with _settings():
            try:
                return compiled(function, batch, *derivatives.arguments)
            except self._failures as error:
                raise CannotCompileError(_reason(error)) from error

    def give_up(self, error: CannotCompileError) -> None:
        """Warn that the loss is evaluated as it is from here on, and why."""
        self.failure = f"{self._title} and its derivatives cannot be compiled as one function. {error}"
        warnings.warn(
            f"{self._title} and its derivatives cannot be compiled as one function; they are run as they are from here "
            f"on. Change what torch.compile objects to, or leave compile= out. {error}",
            MloWarning,
            stacklevel=2,
        )


@contextmanager
def _settings() -> Iterator[None]:
    """Let torch trace as it is to; those settings that this torch does not have cannot be set."""
    config: Any = torch._dynamo.config
    before = {name: getattr(config, name) for name in _SETTINGS if hasattr(config, name)}
    try:
        for name in before:
            setattr(config, name, _SETTINGS[name])
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


class CannotCompileError(Exception):
    """What torch objects to."""


def switched_off() -> bool:
    """Whether torch compiles nothing for the time being: by its environment, or in a mode that looks at operations."""
    off: bool = torch._dynamo.config.disable
    return off or torch._C._len_torch_dispatch_stack() > 0 or torch.is_anomaly_enabled()


def _reason(error: Exception) -> str:
    """Return the beginning of what torch says, what a compiler objects to first, and the place that is named last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:3])[:_LONGEST]
    objections = [line[-_LONGEST:] for line in lines[3:] if "error: " in line]
    places = [line for line in lines if line.startswith("File ")]
    return "; ".join([f"{type(error).__name__}: {said}", *objections[:1], *places[-1:]])


_LONGEST = 300


def _compiled(function: Any, options: Mapping[str, Any]) -> Callable[..., Traced]:
    """Return a compiled copy. Torch keeps what it knows of shapes, and a few variants, for each name and code."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_COPIES)}")
    arguments = {"backend": "inductor", **options, "fullgraph": True}
    backend = torch._dynamo.lookup_backend(arguments["backend"])
    settings: dict[str, Any] = {name: arguments.pop(name) for name in ("mode", "options") if name in arguments}
    if arguments["backend"] == "inductor":
        settings = {"config_patches": settings["options"]}

    def checked(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        _reject_second_derivatives_of_functions(graph)
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
        raise CannotCompileError("torch.compile has no second derivative of a torch.autograd.Function")


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
