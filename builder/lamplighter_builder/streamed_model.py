"""A checkpoint run by transformers in float32 with one decoder layer's weights in memory at a time.

The module tree is transformers' own, so that every family computes as its authors wrote it; only the weights come and
go. For gradients the layers' inputs are kept and each layer is computed again, from the last to the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from lamplighter_builder.checkpoint import Checkpoint
from lamplighter_builder.reference_config import reference_config
from lamplighter_builder.reference_tensors import read_reference_tensor

Forward = Callable[..., Any]
Visit = Callable[[str, nn.Linear, torch.Tensor], None]
"""Is given a linear layer's path, the module and its input [tokens, in_features] before the layer is applied; it may
change the module's weight."""
Observe = Callable[[str, torch.Tensor, torch.Tensor], None]
"""Is given a linear layer's path, its input [tokens, in_features] and the gradient of its output."""

_LAYERS: Final = "model.layers"


@dataclass(slots=True)
class _Call:
    """What a layer was called with: hidden states [B, S, hidden_size], and the rest as the decoder gave it."""

    states: torch.Tensor
    rest: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(slots=True)
class Recording:
    """A run of which gradients are wanted.

    Attributes:
        states: What the head is given, [B, S, hidden_size]; autograd knows how the last norm made it.
        calls: What each layer was called with.
        last: What the last layer returned.
    """

    states: torch.Tensor
    calls: list[_Call]
    last: torch.Tensor


class StreamedModel:
    """The decoder of a checkpoint.

    Args:
        checkpoint: Where the weights are read from.

    Attributes:
        embedding: The embedding's module, loaded.
        head: The head's module, loaded.

    Raises:
        BuildError: If transformers does not take the configuration.
        UnsupportedModelError: If it knows the architecture by other tensor names than the checkpoint's.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        config = reference_config(checkpoint.config)
        with no_init_weights():  # the parameters' memory is reserved and never touched
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config,
                dtype=torch.float32,
                attn_implementation="eager",
                experts_implementation="eager",  # torch's grouped product takes multiples of four features only
            )
        model.tie_weights()
        model.requires_grad_(False)
        model.train(mode=False)
        self._decoder: nn.Module = model.get_decoder()
        self.embedding: nn.Embedding = model.get_input_embeddings()
        self.head: nn.Linear = model.get_output_embeddings()
        self._softcap: float | None = config.to_dict().get("final_logit_softcapping")
        for name, parameter in model.named_parameters():
            if not name.startswith(_LAYERS):
                parameter.data = self._read(name)
        self._layers: list[nn.Module] = list(model.get_submodule(_LAYERS).children())
        self._linear = {
            path: module
            for path, module in model.named_modules()
            # A router is a linear layer that gives more than the product, and is never rounded.
            if type(module) is nn.Linear and path.startswith(_LAYERS)
        }
        self._compute: list[Forward] = [layer.forward for layer in self._layers]
        self._empty = [dict(layer.state_dict()) for layer in self._layers]
        self._calls: list[_Call] = []
        self._result: torch.Tensor | None = None
        for index, layer in enumerate(self._layers):
            layer.forward = self._forward(index)

    @property
    def linear_layers(self) -> frozenset[str]:
        """Paths of the linear layers, which are all that can be listened to."""
        return frozenset(self._linear)

    @property
    def layer_count(self) -> int:
        """Number of decoder layers."""
        return len(self._layers)

    def run(
        self, embedded: torch.Tensor, visit: Visit | None = None, *, done: Callable[[], None] = lambda: None
    ) -> torch.Tensor:
        """Return what the head is given, [B, S, hidden_size], for embedded tokens [B, S, hidden_size].

        Args:
            embedded: The tokens.
            visit: Is given every linear layer.
            done: Called after each decoder layer.
        """
        with torch.no_grad(), self._after_layers(done), ExitStack() as hooks:
            if visit is not None:
                for path, module in self._linear.items():
                    hook = module.register_forward_pre_hook(_before(path, visit))
                    hooks.callback(hook.remove)
            states: torch.Tensor = self._decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return states

    @contextmanager
    def _after_layers(self, done: Callable[[], None]) -> Iterator[None]:
        """Call ``done`` after each decoder layer meanwhile."""
        with ExitStack() as hooks:
            for layer in self._layers:
                hooks.callback(layer.register_forward_hook(lambda *_: done()).remove)
            yield

    def forget_embedding(self) -> None:
        """Give the embedding's memory back, unless the head shares it: only ``logits`` works afterwards."""
        if self.embedding.weight is not self.head.weight:
            self.embedding.weight.data = torch.empty(0)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return [..., vocab_size] for what the head is given, [..., hidden_size]."""
        logits: torch.Tensor = self.head(states)
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def record(self, embedded: torch.Tensor, *, done: Callable[[], None] = lambda: None) -> Recording:
        """Run the decoder and keep what ``backward`` needs: the input of every layer.

        Args:
            embedded: The tokens.
            done: Called after each decoder layer.
        """
        self._calls.clear()
        with torch.enable_grad(), self._after_layers(done):
            states: torch.Tensor = self._decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state
        assert self._result is not None
        recording = Recording(states, self._calls, self._result)
        self._calls, self._result = [], None
        return recording

    def backward(
        self, recording: Recording, gradient: torch.Tensor, observe: Observe, done: Callable[[], None]
    ) -> torch.Tensor:
        """Take the gradients of all layers, the last one first; the recording is used up.

        Args:
            recording: From ``record``.
            gradient: Of ``recording.states``.
            observe: Hears of every linear layer.
            done: Called after each decoder layer.

        Returns:
            The gradient of the embedded tokens.
        """
        (gradient,) = torch.autograd.grad(recording.states, recording.last, gradient)
        for index in reversed(range(self.layer_count)):
            call = recording.calls.pop()
            states = call.states.detach().requires_grad_(True)
            with torch.enable_grad(), self._loaded(index), ExitStack() as hooks:
                for path, module in self._linear.items():
                    hook = module.register_forward_hook(_behind(path, observe))
                    hooks.callback(hook.remove)
                result = self._apply(index, _Call(states, call.rest, call.options))
                (gradient,) = torch.autograd.grad(result, states, gradient)
            done()
        return gradient

    def _forward(self, index: int) -> Forward:
        """Return what stands in for a layer's ``forward``: it computes without gradients and remembers its input."""

        def forward(states: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
            call = _Call(states, rest, options)
            with torch.no_grad(), self._loaded(index):
                result = self._apply(index, call)
            if torch.is_grad_enabled():
                self._calls.append(call)
                self._result = result.requires_grad_(True) if index + 1 == self.layer_count else None
            return result

        return forward

    def _apply(self, index: int, call: _Call) -> torch.Tensor:
        result = self._compute[index](call.states, *call.rest, **call.options)
        states: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return states

    @contextmanager
    def _loaded(self, index: int) -> Iterator[None]:
        """Give a layer its weights for the time of the context."""
        layer, empty = self._layers[index], self._empty[index]
        # New parameters, not new data in the old ones: what autograd saved must stay as it was.
        layer.load_state_dict({name: self._read(f"{_LAYERS}.{index}.{name}") for name in empty}, assign=True)
        layer.requires_grad_(False)
        try:
            yield
        finally:
            layer.load_state_dict(empty, assign=True)

    def _read(self, name: str) -> torch.Tensor:
        return torch.from_numpy(read_reference_tensor(self._checkpoint, name))


def _before(path: str, visit: Visit) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, nn.Linear):
            visit(path, module, inputs[0].flatten(0, -2))

    return hook


def _behind(path: str, observe: Observe) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
    def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x = inputs[0].detach().flatten(0, -2)
        output.register_hook(lambda gradient: observe(path, x, gradient.flatten(0, -2)))  # type: ignore[no-untyped-call]

    return hook
