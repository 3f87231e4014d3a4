"""The embedding and the LM head of a target, which drafters use: tokens to embeddings, last hidden states to logits.

This module must not import drafters or training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headstart.target.hidden_states import forward_with_hidden_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class EmbedHead:
    """Embedding and LM head of a causal LM, used without being changed.

    Raises ValueError, naming the model, where it has no LM head, or where its logits are not a scale and a soft cap of what its LM
    head makes of the last hidden states.

    Attributes:
    hidden: width of the last hidden states (after the final norm), and of an embedding.
    vocab: width of the logits.
    scale: factor of the LM head's output (Cohere, Granite); 1 for most models.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        head = model.get_output_embeddings()
        if head is None:
            raise ValueError(f"{type(model).__name__} has no output embeddings, so no heads can be trained for it")
        config: Any = model.config.get_text_config()
        self._model = model
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)
        # Cohere multiplies its logits, Granite divides them.
        self.scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
        self.hidden = int(config.hidden_size)
        self._check(str(getattr(model.config, "_name_or_path", "") or type(model).__name__))

    @property
    def lm_head(self) -> nn.Module:
        """The linear from [..., hidden] to [..., vocab]; read from the model each time, because kernels may have replaced it."""
        lm_head: nn.Module = self._model.get_output_embeddings()
        return lm_head

    @property
    def embedding(self) -> nn.Module:
        """From tokens [...] to their embeddings [..., hidden]; read from the model each time."""
        embedding: nn.Module = self._model.get_input_embeddings()
        return embedding

    @property
    def lm_head_weight(self) -> Tensor:
        """[vocab, hidden] weight of the LM head, from which other heads may start; dequantised where it is quantised."""
        weight: Tensor = self.lm_head.weight  # type: ignore[assignment]
        if type(weight.data) is Tensor and weight.is_floating_point():
            return weight.detach()
        units = torch.eye(self.hidden, device=self._model.device, dtype=self._model.dtype)
        columns: Tensor = self.lm_head(units) - self.lm_head(torch.zeros_like(units[:1]))  # without the bias
        return columns.detach().T

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The LM head's parameters, for callers that train it; none where kernels have packed it."""
        return tuple(self.lm_head.parameters())

    @property
    def embed_weight(self) -> Tensor:
        """[vocab, hidden] embedding of every token."""
        return self.embed(torch.arange(self.vocab, device=self._model.device)).detach()

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens [...] int64 -> their embeddings [..., hidden]."""
        embedded: Tensor = self.embedding(tokens)
        return embedded

    def logits(self, states: Tensor) -> Tensor:
        """Last hidden states [..., hidden], after the final norm -> the target's logits [..., vocab]."""
        return self.scale_logits(self.lm_head(states.to(self._model.dtype)))

    def scale_logits(self, logits: Tensor) -> Tensor:
        """The LM head's output -> the model's logits: scaled and soft-capped where the model does so. Same shape."""
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    @torch.no_grad()
    def _check(self, name: str) -> None:
        """Raise ValueError where a forward does something else between the last hidden states and the logits; set `vocab`."""
        model, calls = self._model, []
        last = int(model.config.get_text_config().num_hidden_layers) - 1
        hook = self.lm_head.register_forward_hook(lambda module, args, out: calls.append((args[0], out)))
        try:
            ids = torch.tensor([[0, 1]], device=model.device)
            out, states = forward_with_hidden_states(
                model, [last], input_ids=ids, position_ids=torch.tensor([[0, 1]], device=model.device), use_cache=False
            )
        finally:
            hook.remove()
        self.vocab = int(out.logits.shape[-1])
        is_last_hidden = len(calls) == 1 and calls[0][0].shape == states[last].shape and torch.equal(calls[0][0], states[last])
        if not is_last_hidden or not torch.allclose(
            self.scale_logits(calls[0][1]).float(), out.logits.float(), rtol=1e-3, atol=1e-3
        ):
            raise ValueError(f"{name} ({type(model).__name__}) computes logits from hidden states in a way that is not supported")
