"""The class encoder as a captured CUDA graph: its forward and backward pass, replayed in every training step.

A step of a few classes has little work for a GPU and many launches for the host. The class embeddings of a step depend
on the trained tensors and on nothing in the batch, so both passes are captured once. [`CapturedEncoding`] holds the
graphs and their buffers, [`GraphedEncoder`] decides when to capture, and `graph_state` whether it is possible.
"""

from __future__ import annotations

import functools
import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import get_device_states

from ..towers import execution_device, text_side
from .chunks import autocast_state
from .graph_state import NOTHING_TRAINED, TowerState, facts_of_modes, numeric_settings, obstacle_to_capture
from .memory import free_bytes
from .packing import attention_of


AUTO = "auto"
NUM_WARM_UPS = 3
# A state that changes all the time, such as classes drawn anew for every step, is not captured again and again.
WORTH_IT = 3  # the number of steps that a capture has to serve
NUM_WASTED = 2  # the number of captures in a row that may serve fewer
CHANGING = "what they depend on changes in nearly every step"

logger = logging.getLogger(__name__)

# The result of a capture: the tensors that a function has returned, and a call that computes them anew in place.
Replayable = tuple[list[torch.Tensor], Callable[[], None]]


class CudaEngine:
    """Captures functions as CUDA graphs. The tests have one for the CPU, which keeps its results in place, too."""

    device_type = "cuda"

    def capture(
        self,
        device: torch.device,
        functions: Sequence[Callable[[], Sequence[torch.Tensor]]],
        forget: Callable[[], None],
    ) -> list[Replayable]:
        """Captures functions. Later ones use intermediate results of earlier ones, until `forget` is called."""
        stream, pool = _side_stream(device), torch.cuda.graph_pool_handle()
        replayables: list[Replayable] = []
        # If a capture fails, `torch.cuda.graph` leaves its own stream behind as the current one. This does not.
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(NUM_WARM_UPS):
                    for function in functions:
                        function()
                forget()
            torch.cuda.current_stream().wait_stream(stream)
            for function in functions:
                graph = torch.cuda.CUDAGraph()
                # Other threads may allocate meanwhile, such as the one of a data loader that pins memory.
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    results = list(function())
                replayables.append((results, _InOrder(graph, device)))
        forget()  # a replay finds what it needs where it was, in the memory of the graphs
        return replayables

    def give_back(self) -> None:
        """Returns the memory of graphs that nobody holds any more."""
        torch.cuda.empty_cache()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # One for all captures: libraries keep a workspace for every stream that they have met.
    return torch.cuda.Stream(device)


class _InOrder:
    """Replays a graph on the current stream, after what it has done on another one: its buffers are the same."""

    def __init__(self, graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
        self.graph, self.device, self.stream = graph, device, torch.cuda.current_stream(device)

    def __call__(self) -> None:
        stream = torch.cuda.current_stream(self.device)
        if stream != self.stream:
            stream.wait_stream(self.stream)
            self.stream = stream
        self.graph.replay()


class CannotCapture(Exception):
    """Says why something was not captured, in words that follow "since"."""


class _Run:
    """A forward pass. Its inputs are kept from the moment on when another pass takes over the buffers."""

    inputs: list[torch.Tensor] | None = None


class CapturedEncoding:
    """
    The captured forward and backward pass of a function of a few tensors.

    The graphs read and write the same buffers in every replay, so results leave as copies, and trained tensors are
    copied into them. If another forward pass has come between a forward and its backward pass, the first one is
    replayed before its backward pass.

    Args:
        engine (`CudaEngine`):
            What captures.
        function (`Callable`):
            Returns (C, E) with some tensors in place of the trained ones, see [`run_with`].
        parameters (`Sequence[torch.Tensor]`):
            The trained tensors. They are not changed and get no gradient.
        frozen (`Sequence[torch.Tensor]`):
            All other tensors that the function may use. They are kept alive.

    **Attributes**:
        - **used** (`list[int]`): The indices of the parameters that gradients flow to.
        - **num_replays** (`int`): The number of forward passes.

    Raises:
        CannotCapture: If the function changes buffers, draws random numbers, or uses a parameter unseen.
    """

    def __init__(
        self,
        engine: CudaEngine,
        function: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], torch.Tensor],
        parameters: Sequence[torch.Tensor],
        frozen: Sequence[torch.Tensor],
    ) -> None:
        self.device = parameters[0].device
        self.autocasts = autocast_state(self.device)
        self.frozen = [tensor.detach() for tensor in frozen]  # which share memory and versions
        self.versions = [tensor._version for tensor in self.frozen]
        self.num_replays = 0
        self._lock = threading.Lock()
        self._last: Callable[[], _Run | None] = lambda: None  # the pass whose values are in the buffers
        self._inputs = [parameter.detach().clone().requires_grad_() for parameter in parameters]
        self.used, self._gradient = self._try(function, parameters)
        used_inputs = [self._inputs[index] for index in self.used]
        output = torch.empty(0)

        def forward() -> list[torch.Tensor]:
            nonlocal output
            with self.autocast():
                output = function(parameters, self._inputs)
            return [output.detach()]

        def backward() -> Sequence[torch.Tensor]:
            # Its graph is retained, so that nothing is written over what a second backward pass needs.
            with self.autocast(is_on=False):
                return torch.autograd.grad(output, used_inputs, self._gradient, retain_graph=True)

        def forget() -> None:
            nonlocal output
            output = torch.empty(0)

        ((self._embeds,), self._replay_forward), (self._gradients, self._replay_backward) = engine.capture(
            self.device, (forward, backward), forget
        )

    def autocast(self, is_on: bool = True) -> ExitStack:
        """Returns the autocast of the capture, or none. It keeps no casts: a replay would not make them again."""
        stack = ExitStack()
        for device_type, (is_enabled, dtype) in self.autocasts.items():
            stack.enter_context(torch.autocast(device_type, dtype, is_enabled and is_on, cache_enabled=False))
        return stack

    def _try(self, function, parameters) -> tuple[list[int], torch.Tensor]:
        """Runs both passes once. Returns the indices of the parameters in use, and a buffer (C, E) for a gradient."""
        before = _random_states(self.device)
        with self.autocast():
            output = function(parameters, self._inputs)
        if not output.requires_grad:  # such as with merged adapters
            raise CannotCapture(NOTHING_TRAINED)
        gradient = torch.zeros_like(output)
        reached = torch.autograd.grad(output, [*self._inputs, *parameters], gradient, allow_unused=True)
        if any(gradient is not None for gradient in reached[len(parameters) :]):
            raise CannotCapture("the text tower uses its trained weights in operations that cannot be followed")
        if not all(map(torch.equal, before, _random_states(self.device))):
            raise CannotCapture("the text tower draws random numbers")
        if [tensor._version for tensor in self.frozen] != self.versions:
            raise CannotCapture("the text tower changes its buffers")
        return [i for i in range(len(parameters)) if reached[i] is not None], gradient

    def forward(self, parameters: Sequence[torch.Tensor]) -> tuple[_Run, torch.Tensor]:
        """Returns the pass, and (C, E) for the values of these parameters."""
        run = _Run()
        with self._lock, torch.no_grad():
            self._compute(run, parameters)
            self.num_replays += 1
            return run, self._embeds.clone()

    def backward(self, run: _Run, gradient: torch.Tensor) -> list[torch.Tensor]:
        """Returns the gradients of the parameters in use, for the gradient (C, E) of the result of a pass."""
        with self._lock, torch.no_grad():
            if [tensor._version for tensor in self.frozen] != self.versions:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    "a frozen weight of the text tower was changed between the forward and the backward pass."
                )
            if self._last() is not run:
                self._compute(run, run.inputs)
            self._gradient.copy_(gradient)
            self._replay_backward()
            return [gradient.clone() for gradient in self._gradients]

    def _compute(self, run: _Run, values: Sequence[torch.Tensor]) -> None:
        last = self._last()
        if last is not None and last.inputs is None:
            last.inputs = [tensor.detach().clone() for tensor in self._inputs]
        for tensor, value in zip(self._inputs, values):
            tensor.copy_(value)
        self._replay_forward()
        self._last = weakref.ref(run)


def _random_states(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *get_device_states(torch.empty(0, device=device))[1]]


def run_with(
    encode: Callable[[], torch.Tensor], tensors: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Returns what `encode` returns if some tensors have other values, without a change that other threads see."""
    with _Instead({id(tensor): value for tensor, value in zip(tensors, values)}):
        return encode()


class _Instead(TorchFunctionMode):
    """Passes other tensors to the functions of torch. It acts in the thread that enters it."""

    def __init__(self, values: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self.values = values

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*self._replaced(args), **{name: self._replaced(v) for name, v in (kwargs or {}).items()})

    def _replaced(self, value):
        if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
            return type(value)(map(self._replaced, value))
        return self.values.get(id(value), value) if isinstance(value, torch.Tensor) else value


class _Replayed(torch.autograd.Function):
    """A replayed forward pass, as any other operation of autograd. Its inputs are the parameters in use."""

    @staticmethod
    def forward(ctx, captured: CapturedEncoding, function, parameters: list[torch.Tensor], *used):
        ctx.captured, ctx.function = captured, function
        ctx.save_for_backward(*used)
        ctx.run, embeds = captured.forward(parameters)
        return embeds

    @staticmethod
    def backward(ctx, gradient):
        if not torch.is_grad_enabled():
            return None, None, None, *ctx.captured.backward(ctx.run, gradient)
        # With create_graph=True, the gradient is a result that can be differentiated itself.
        used = ctx.saved_tensors
        with ctx.captured.autocast():
            embeds = ctx.function(used, used)
        return None, None, None, *torch.autograd.grad(embeds, used, gradient, create_graph=True)


@dataclass(frozen=True)
class Plan:
    """
    How class embeddings are computed in the current state of the model.

    Attributes:
        encode: Returns (C, E) for the model, to which it holds no reference.
        num_chunks: The number of chunks of classes.
        is_shared: Whether processes share the classes.
        needed_bytes: The memory that the activations of both passes take up.
    """

    encode: Callable[..., torch.Tensor]
    num_chunks: int
    is_shared: bool
    needed_bytes: int


class GraphedEncoder:
    """
    Takes class embeddings from a captured graph where that is possible, and captures anew when something has changed.

    Args:
        engine (`CudaEngine`, *optional*):
            What captures.
    """

    def __init__(self, engine: CudaEngine | None = None) -> None:
        self.engine = CudaEngine() if engine is None else engine
        self._lock = threading.RLock()  # threads that share a model capture one after the other
        self._told: set[str] = set()
        self.clear()

    def clear(self) -> None:
        """Drops the graph and gives its memory back, as soon as no backward pass needs it any more."""
        self._key: tuple | None = None
        self._captured: CapturedEncoding | None = None
        self._plan: Plan | None = None
        self._reason: str | None = None
        self._num_wasted = 0

    def clear_elsewhere(self, device: torch.device) -> None:
        """Drops the graph if it is on another device, where it keeps weights alive that have moved."""
        if self._captured is not None and self._captured.device != device:
            self.clear()

    def encode(
        self,
        model,
        inputs: tuple,
        tensors: Sequence[torch.Tensor],
        make_plan: Callable[[], Plan],
        setting: bool | str,
    ) -> torch.Tensor | None:
        """Returns (C, E), differentiably, or `None` if they have to be computed in the ordinary way.

        Args:
            model:
                The classifier.
            inputs (`tuple`):
                What class embeddings depend on, besides the model and the settings of torch.
            tensors (`Sequence[torch.Tensor]`):
                The frozen tensors that they depend on besides.
            make_plan (`Callable`):
                Returns the plan for the current state.
            setting (`bool` or `str`):
                As in [`GraphedEncoder.tell`].
        """
        device = execution_device(model.text_model)
        self.clear_elsewhere(device)
        modes = facts_of_modes(device, self.engine.device_type)
        reason = obstacle_to_capture(modes)
        if reason is None:
            with self._lock:
                try:
                    state = TowerState(text_side(model), tensors)
                except RuntimeError:  # inference tensors and those of some libraries
                    self.tell("a weight of the text tower has no address or no version", setting)
                    return None
                key = (state, inputs, device, attention_of(model.text_model), numeric_settings(device))
                if key != self._key or self._reason == CHANGING:
                    self._renew(model, key, tensors, modes, make_plan)
                captured, plan, reason = self._captured, self._plan, self._reason
                if captured is not None:
                    used = [state.trained[index] for index in captured.used]
                    function = functools.partial(run_with, functools.partial(plan.encode, model))
                    return _Replayed.apply(captured, function, state.trained, *used)
        self.tell(reason, setting)
        return None

    def tell(self, reason: str, setting: bool | str) -> None:
        """Says once why there is no graph: as a debug message if `setting` is `"auto"`, otherwise as a warning."""
        message = f"Class embeddings are computed without a captured CUDA graph, since {reason}."
        if reason in self._told:
            return
        self._told.add(reason)
        if setting != AUTO:
            warnings.warn(f"{message} Set cuda_graph={AUTO!r} to leave out this warning.", stacklevel=2)
        else:
            logger.debug(message)

    def _renew(self, model, key: tuple, tensors: Sequence[torch.Tensor], modes, make_plan) -> None:
        """Captures for a new key, or notes why not."""
        is_repeated, has_freed = key == self._key, self._captured is not None
        if self._captured is not None:
            self._num_wasted = 0 if self._captured.num_replays >= WORTH_IT else self._num_wasted + 1
        self._key = self._captured = self._plan = None
        plan, state = make_plan(), key[0]
        trained_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.trained)
        facts = replace(
            modes,
            **state.facts(),
            is_shared=plan.is_shared,
            num_chunks=plan.num_chunks,
            needed_bytes=plan.needed_bytes + 2 * trained_bytes,  # copies and gradients
            free_bytes=free_bytes(key[2]),
        )
        self._reason = obstacle_to_capture(facts)
        if self._reason is None and self._num_wasted >= NUM_WASTED and not is_repeated:
            self._reason = CHANGING
        if self._reason is None:
            self._reason = self._capture(model, plan, state)
            # The state of now, since a first use of an adapter notes that its weights were checked.
            state = TowerState(text_side(model), tensors)
            has_freed = has_freed or self._reason is not None
        self._key = (state, *key[1:])
        if has_freed:
            self.engine.give_back()

    def _capture(self, model, plan: Plan, state: TowerState) -> str | None:
        """Captures, or returns why that has failed."""
        function = functools.partial(run_with, functools.partial(plan.encode, model))
        devices, _ = get_device_states(state.trained[0])
        device_type = state.trained[0].device.type if devices else "cuda"
        try:
            with torch.random.fork_rng(devices, device_type=device_type):
                self._captured = CapturedEncoding(self.engine, function, state.trained, state.frozen)
        except CannotCapture as obstacle:
            return str(obstacle)
        except Exception as error:  # whatever it is: if it is more than the capture, the ordinary way raises it again
            return f"the capture has failed ({type(error).__name__}: {error})"
        self._plan = plan
        return None
