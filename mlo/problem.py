"""`Problem`: one learning stage, and the views that its loss has of the problems it depends on."""

from __future__ import annotations

import keyword
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from mlo.compiled_loss import compile_options
from mlo.errors import ConfigurationError, DependencyError
from mlo.frame import Frame, Parameters
from mlo.hypergradient import HypergradientMethod
from mlo.options import is_count, is_number

#: What an engine builds upon, and what may change between its steps.
FIXED_OPTIONS = (
    "name",
    "module",
    "optimizer",
    "data",
    "depends_on",
    "constants",
    "hypergradient",
    "solve_data",
    "start_from",
    "compile",
)
_ADJUSTABLE = ("steps", "accumulate", "warmup", "scheduler", "grad_clip", "solve_batches")
_RESERVED = (*FIXED_OPTIONS, *_ADJUSTABLE, "params", "deps", "__call__", "__setattr__")
_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


class Problem(ABC):
    """One learning stage: minimise `training_step` over the parameters of `module`.

    A subclass implements `training_step`. In there `self(...)` runs the module, `self.params` maps the
    names of its parameters to tensors, and `self.deps.<role>` is a view of another problem with the same
    two. All of them see the tensors that the engine has bound for the evaluation at hand: the parameters
    themselves while the stage trains, differentiable responses when an upper problem is differentiated,
    shifted ones inside a hypergradient method. User code need not know.

    Args:
        name: a Python identifier, unique in the engine.
        module: holds the stage's parameters. Those with `requires_grad` are optimized (those that the
            optimizer holds, if there is one); the others are constants.
        optimizer: any `torch.optim.Optimizer` over parameters of `module`. It is used as it is, never rebuilt.
            Without one the problem can be differentiated, but takes no steps.
        data: a re-iterable of batches (a `DataLoader`, a list), run through again and again. A batch reaches
            `training_step` as the data gave it. `None`: `training_step(None)`.
        depends_on: the problems that the loss reads: a sequence of names, or a mapping from the role under
            which the loss uses one to its name.
        steps: optimizer steps each time that the stage is solved (for a root: per engine step).
        hypergradient: the method by which gradients pass through this stage's solution to the problems that
            it depends on. `None`: `mlo.ConjugateGradient()`.
        scheduler: a learning-rate scheduler of `optimizer`, stepped after each optimizer step;
            `ReduceLROnPlateau` is stepped at validation with the value of `validation_step`.
        grad_clip: upper limit of the gradient's norm; larger gradients are scaled down to it.
        accumulate: number of batches whose mean loss makes one step.
        constants: names of earlier problems whose present value is taken as given, where a response that is
            read depends on them (see `mlo.Engine`).
        solve_batches: number of batches whose mean loss gives the Hessian and the mixed products of a hypergradient
            through this stage, drawn anew for each one from `data`. `None`: the batches of the stage's last step.
        solve_data: a stream of its own, in place of `data`, for these batches (one of them, if `solve_batches` is
            `None`); re-iterable like `data`.
        start_from: the role of a problem in `depends_on` at whose parameters the stage starts over each time that it is
            solved, with its optimizer's state cleared; every trainable parameter is copied from the one of the same
            name. Gradients go back to it through `Unroll` (MAML); for the solution that other methods differentiate
            the start does not matter.
        warmup: number of engine steps in which the problem takes no steps, while those below it train.
        compile: `True`, or a dict of arguments for `torch.compile`: the loss and its derivatives are one compiled
            function, where these are first derivatives (training steps, central differences) or the mixed product of
            `Identity`; so is what `FiniteDifference`, `Identity`, `ConjugateGradient` and `Neumann` do at a stage, if
            it is small or the steps are few (up to 20); and where all problems of a hypergradient have the same
            `compile`, all of it. The same results but for rounding. What torch cannot compile runs as it is, with a
            warning; evaluations 1, 2, 4, 8, … stay eager, since the checks look at their graphs.

    Raises:
        ConfigurationError: an argument is of a wrong kind or out of range; or `compile` asks for what this torch
            cannot do.

    A subclass may set attributes of its own and override the constructor. Reserved names: the arguments
    above, `params`, `deps`, `training_step`, `validation_step`. The arguments are attributes too. `steps`,
    `accumulate`, `warmup`, `scheduler` and `grad_clip` may be changed between steps of an engine; to change another,
    build a new engine.

    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        data: Iterable[Any] | None = None,
        depends_on: Sequence[str] | Mapping[str, str] = (),
        steps: int = 1,
        hypergradient: HypergradientMethod | None = None,
        scheduler: Any = None,
        grad_clip: float | None = None,
        accumulate: int = 1,
        constants: Sequence[str] = (),
        warmup: int = 0,
        solve_batches: int | None = None,
        solve_data: Iterable[Any] | None = None,
        start_from: str | None = None,
        compile: bool | Mapping[str, Any] | None = None,  # noqa: A002  (torch's name)
    ) -> None:
        """Keep the definition of the problem; every option is checked as it is set."""
        self.name = name
        self.module = module
        self.optimizer = optimizer
        self.data = data
        self.depends_on = depends_on  # type: ignore[assignment]
        self.constants = constants  # type: ignore[assignment]
        self.hypergradient = hypergradient
        self.scheduler = scheduler
        self.steps, self.accumulate, self.warmup = steps, accumulate, warmup
        self.grad_clip = grad_clip
        self.solve_batches = solve_batches
        self.solve_data = solve_data
        self.start_from = start_from
        self.compile = compile  # type: ignore[assignment]

    depends_on: Mapping[str, str]
    constants: tuple[str, ...]
    #: The arguments of `torch.compile`; `None` where nothing is compiled.
    compile: dict[str, Any] | None
    #: Set by the engine for the span of an evaluation.
    _frame: Frame | None = None
    #: How often one of the fixed options was set.
    _options_set = 0
    #: All problems of the engine that this one is part of.
    _known: Mapping[str, Problem] = MappingProxyType({})
    _dependency_views: Dependencies | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse subclasses that would hide what the engine relies on."""
        super().__init_subclass__(**kwargs)
        for reserved in _RESERVED:
            if reserved in cls.__dict__:
                raise ConfigurationError(
                    f"{cls.__name__}.{reserved}: this name is reserved by mlo.Problem; choose another one."
                )

    def __setattr__(self, name: str, value: object) -> None:
        """Check an option whenever it is set."""
        check = _CHECKS.get(name)
        super().__setattr__(name, value if check is None else check(self, value))
        if name in FIXED_OPTIONS:
            self.__dict__.update(_options_set=self._options_set + 1, _dependency_views=None)

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle the problem alone, without the engine that it is in."""
        state = {
            key: value for key, value in self.__dict__.items() if key not in ("_frame", "_known", "_dependency_views")
        }
        return {**state, "depends_on": dict(self.depends_on)}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Restore a copy."""
        self.__dict__.update(state, depends_on=MappingProxyType(state["depends_on"]))  # checked before

    @abstractmethod
    def training_step(self, batch: Any) -> Tensor | Mapping[str, Any]:
        """Return the loss: a scalar tensor, or a dict with `"loss"` and numbers to log under other keys."""

    def validation_step(self) -> float | Tensor | Mapping[str, Any] | None:
        """Return a metric, a dict of them, or `None`; called at validation, in evaluation mode without gradients.

        A `ReduceLROnPlateau` scheduler gets the metric, or the entry `"loss"` of the dict.
        """
        return None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module with the parameters of the evaluation at hand."""
        return self.module(*args, **kwargs)

    @property
    def params(self) -> Parameters:
        """The parameters of the evaluation at hand by name, frozen ones included."""
        if self._frame is not None:
            return self._frame.parameters(self.name)
        return Parameters(self.name, dict(self.module.named_parameters()))

    @property
    def deps(self) -> Dependencies:
        """Views of the problems that this one depends on, by role."""
        if self._dependency_views is None:
            self.__dict__["_dependency_views"] = Dependencies(self)
        return self._dependency_views  # type: ignore[return-value]

    def _introduce(self, problems: Mapping[str, Problem]) -> None:
        """Let the problem find all others of its engine."""
        if self._known is not problems:
            self.__dict__.update(_known=problems, _dependency_views=None)

    def __repr__(self) -> str:
        """Return the class and the name."""
        return f"{type(self).__name__}({self.name!r})"

    def _error(self, option: str, expected: str, got: object) -> ConfigurationError:
        """Return the error for an argument that is not what it should be."""
        return ConfigurationError(f"problem {self.name!r}, {option}: expected {expected}; got {got}.")

    def _checked_module(self, module: object) -> nn.Module:
        if not isinstance(module, nn.Module):
            hint = "; wrap a bare tensor, e.g. in torch.nn.ParameterDict" if isinstance(module, Tensor) else ""
            raise self._error("module", f"a torch.nn.Module{hint}", type(module).__name__)
        for part in module.modules():
            if type(part).__name__ in _WRAPPERS:
                raise self._error(
                    "module",
                    "the bare module (hypergradients bypass the hooks by which a wrapper synchronises): pass "
                    "wrapper.module, and average the gradients over processes yourself",
                    type(part).__name__,
                )
            if isinstance(part, torch.jit.ScriptModule):
                raise self._error("module", "an eager module, whose parameters can be bound", type(part).__name__)
        named = dict(module.named_parameters())
        for name, parameter in named.items():
            if nn.parameter.is_lazy(parameter):
                raise self._error("module", "initialised parameters: run the module once before", f"lazy {name!r}")
            if parameter.is_complex():
                raise self._error("module", "real parameters", f"complex {name!r}")
        if not any(p.requires_grad for p in named.values()):
            got = "only frozen ones" if named else "none"
            raise self._error("module", "at least one parameter with requires_grad", got)
        return module

    def _checked_optimizer(self, optimizer: object) -> torch.optim.Optimizer | None:
        if optimizer is None:
            return None
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise self._error(
                "optimizer", "a torch.optim.Optimizer such as SGD(module.parameters(), lr=0.1)", repr(optimizer)
            )
        own = {id(p): p for p in self.module.parameters()}
        held = [p for group in optimizer.param_groups for p in group["params"]]
        foreign = sum(id(p) not in own for p in held)
        if foreign:
            raise self._error(
                "optimizer",
                "parameters of the problem's module only (build it from module.parameters(), after moving the module)",
                f"{foreign} of {len(held)} that are not in the module",
            )
        if not any(p.requires_grad for p in held):
            raise self._error("optimizer", "at least one parameter with requires_grad", "only frozen ones")
        return optimizer

    def _checked_data(self, data: object, option: str = "data") -> Iterable[Any] | None:
        if data is None:
            return None
        expected = "a re-iterable of batches such as a DataLoader or a list"
        if isinstance(data, Iterator):
            raise self._error(
                option, f"{expected}, which can be run through again", f"{type(data).__name__}, which cannot"
            )
        if isinstance(data, Tensor | str | bytes | Mapping) or type(data).__module__ == "numpy":
            raise self._error(option, f"{expected}; for one batch used in every step pass [batch]", type(data).__name__)
        if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
            remedy = "DataLoader(dataset, batch_size=32, shuffle=True), or batch_size=None if its items are batches"
            raise self._error(option, f"{expected}: wrap the data set in a {remedy}", type(data).__name__)
        if isinstance(data, tuple) and data and all(isinstance(part, Tensor) for part in data):
            raise self._error(
                option,
                f"{expected}; for one batch of {len(data)} tensors used in every step pass [batch]",
                "a tuple of tensors",
            )
        if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
            raise self._error(option, expected, type(data).__name__)
        if hasattr(data, "__len__") and len(data) == 0:
            raise self._error(option, "at least one batch", "empty data (drop_last with a batch larger than the data?)")
        return data  # type: ignore[return-value]

    def _checked_roles(self, depends_on: object) -> Mapping[str, str]:
        if isinstance(depends_on, Mapping):
            roles = dict(depends_on)
            for role in roles:
                _checked_name(role, f"problem {self.name!r}, depends_on: role")
            self._checked_names("depends_on", list(dict.fromkeys(roles.values())))
        else:
            roles = {name: name for name in self._checked_names("depends_on", depends_on)}
        return MappingProxyType(roles)

    def _checked_start(self, role: object) -> str | None:
        if role is None:
            return None
        if not isinstance(role, str) or role not in self.depends_on:
            declared = ", ".join(map(repr, self.depends_on)) or "none"
            raise self._error("start_from", f"a role that depends_on declares (declared: {declared})", repr(role))
        if self.optimizer is None:
            raise self._error("start_from", "an optimizer that goes on from there", "none")
        return role

    def _checked_names(self, option: str, names: object) -> tuple[str, ...]:
        expected = "a sequence of problem names" + (" or a mapping role → name" if option == "depends_on" else "")
        if isinstance(names, str):
            raise self._error(option, f"{expected}, e.g. ({names!r},)", f"the string {names!r}")
        if not isinstance(names, Iterable):
            raise self._error(option, expected, repr(names))
        given = tuple(names)
        for name in given:
            if isinstance(name, Problem):
                raise self._error(option, f"names, e.g. {name.name!r}", f"the problem {name.name!r} itself")
            _checked_name(name, f"problem {self.name!r}, {option}: name")
        repeated = sorted({n for n in given if given.count(n) > 1})
        if repeated:
            raise self._error(option, "each name once", f"{', '.join(repeated)} more than once")
        return given

    def _checked_count(self, option: str, value: object, least: int) -> int:
        if not is_count(value) and not (least == 0 and value == 0 and not isinstance(value, bool)):
            raise self._error(option, f"an integer of at least {least}", repr(value))
        return int(value)  # type: ignore[call-overload, no-any-return]

    def _checked_method(self, method: object) -> HypergradientMethod | None:
        if method is not None and not isinstance(method, HypergradientMethod):
            hint = f"; write {method.__name__}()" if isinstance(method, type) else ""
            raise self._error("hypergradient", f"a method such as mlo.FiniteDifference(){hint}", repr(method))
        return method

    def _checked_scheduler(self, scheduler: Any) -> Any:
        if scheduler is None:
            return None
        if self.optimizer is None:
            raise self._error("scheduler", "none without an optimizer", type(scheduler).__name__)
        if not callable(getattr(scheduler, "step", None)):
            raise self._error("scheduler", "a scheduler of torch.optim.lr_scheduler", repr(scheduler))
        if getattr(scheduler, "optimizer", self.optimizer) is not self.optimizer:
            raise self._error("scheduler", "a scheduler of this problem's own optimizer", "one of another optimizer")
        plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        if plateau and type(self).validation_step is Problem.validation_step:
            raise self._error(
                "scheduler", "a validation_step that returns the metric for ReduceLROnPlateau", "no validation_step"
            )
        return scheduler

    def _checked_compile(self, value: object) -> dict[str, Any] | None:
        if value is None or value is False:
            return None
        if value is not True and not isinstance(value, Mapping):
            raise self._error("compile", "True, False, or a dict of arguments for torch.compile", repr(value))
        try:
            return compile_options(value)
        except ValueError as error:
            raise ConfigurationError(f"problem {self.name!r}, compile: expected {error}.") from None

    def _checked_clip(self, clip: object) -> float | None:
        if clip is None:
            return None
        if not is_number(clip) or clip <= 0:  # type: ignore[operator]
            raise self._error("grad_clip", "a positive number or None", repr(clip))
        return float(clip)  # type: ignore[arg-type]


_CHECKS: Mapping[str, Callable[[Problem, Any], object]] = {
    "name": lambda _, value: _checked_name(value),
    "module": Problem._checked_module,
    "optimizer": Problem._checked_optimizer,
    "data": Problem._checked_data,
    "depends_on": Problem._checked_roles,
    "constants": lambda p, value: p._checked_names("constants", value),
    "hypergradient": Problem._checked_method,
    "scheduler": Problem._checked_scheduler,
    "steps": lambda p, value: p._checked_count("steps", value, 1),
    "accumulate": lambda p, value: p._checked_count("accumulate", value, 1),
    "warmup": lambda p, value: p._checked_count("warmup", value, 0),
    "grad_clip": Problem._checked_clip,
    "solve_batches": lambda p, value: None if value is None else p._checked_count("solve_batches", value, 1),
    "start_from": lambda p, value: p._checked_start(value),
    "solve_data": lambda p, value: p._checked_data(value, "solve_data"),
    "compile": Problem._checked_compile,
}


class Dependencies:
    """Views of the problems that one problem depends on: `deps.role` or `deps["role"]`."""

    __slots__ = ("_problem", "_views")

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._views: dict[str, DependencyView] = {}

    def __getattr__(self, role: str) -> DependencyView:
        """Return the view of the problem in this role."""
        return self[role]

    def __getitem__(self, role: str) -> DependencyView:
        """Return the view of the problem in this role."""
        view = self._views.get(role)
        if view is None:
            view = self._views[role] = self._view(role)
        frame = self._problem._frame
        if frame is not None:
            frame.used.add(view.name)
        return view

    def prepare(self) -> None:
        """Make all views, so that it is not a compiled loss that makes them."""
        if len(self._views) < len(self):
            for role in self:
                if role not in self._views:
                    self._views[role] = self._view(role)

    def _view(self, role: str) -> DependencyView:
        problem = self._problem
        name = problem.depends_on.get(role)
        if name is None:
            declared = ", ".join(map(repr, problem.depends_on)) or "none"
            raise DependencyError(
                f"problem {problem.name!r} reaches for the dependency {role!r}, which it does not declare; declared: "
                f"{declared}. Add it to depends_on=."
            )
        other = problem._known.get(name)
        if other is None:
            raise DependencyError(
                f"problem {problem.name!r} reaches for its dependency {role!r} before it is part of an engine; build "
                "mlo.Engine with all problems first."
            )
        return DependencyView(name, other.module, problem)

    def __contains__(self, role: object) -> bool:
        """Whether a role is declared."""
        return role in self._problem.depends_on

    def __iter__(self) -> Iterator[str]:
        """Run over the declared roles."""
        return iter(self._problem.depends_on)

    def __len__(self) -> int:
        """Return the number of declared roles."""
        return len(self._problem.depends_on)

    def __repr__(self) -> str:
        """Return the roles and the names."""
        return f"Dependencies({dict(self._problem.depends_on)})"


class DependencyView:
    """A read-only view of another problem, as the evaluation at hand sees it.

    Attributes:
        name: the problem's name.
        params: its parameters by name, frozen ones included.
        module: its module, running with these parameters.

    """

    __slots__ = ("_reader", "module", "name")

    def __init__(self, name: str, module: nn.Module, reader: Problem) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "module", module)
        object.__setattr__(self, "_reader", reader)

    name: str
    module: nn.Module
    _reader: Problem

    @property
    def params(self) -> Parameters:
        """The parameters of the evaluation at hand by name; outside of one, the present values as constants."""
        frame = self._reader._frame
        if frame is not None:
            return frame.parameters(self.name)
        return Parameters(self.name, {n: p.detach() for n, p in self.module.named_parameters()})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the problem's module with the parameters of the evaluation at hand."""
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> NoReturn:
        """Say how to reach what is not an attribute of the view."""
        raise DependencyError(
            f"the view of problem {self.name!r} has no attribute {name!r}; it can be called, and has params, module "
            f"and name. Use .params[{name!r}] for a parameter, .module.{name} for anything else of the module."
        )

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse: a view is read-only."""
        raise DependencyError(f"the view of problem {self.name!r} is read-only; {name!r} cannot be set.")

    def __repr__(self) -> str:
        """Return the name."""
        return f"DependencyView({self.name!r})"


def _checked_name(name: object, what: str = "Problem(name=…)") -> str:
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or name.startswith("__"):
        raise ConfigurationError(
            f"{what}: expected a Python identifier such as 'stage_1', so that self.deps.<name> can be written; "
            f"got {name!r}."
        )
    return name
