"""The two ends of a language model: tokens to embeddings, and final states to logits.

Drafters borrow them: Hydra and EAGLE embed with the target's table, heads without a projection of their own speak through its
head. This file knows embeddings and heads. It refuses to know layers, drafters and training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headstart.target.hidden_states import forward_with_hidden_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class EmbedHead:
    """Embedding and head of a causal LM, frozen. Raises ValueError, naming the model, where its head does something unknown.

    hidden: width of the final, normed states, which is also the width of an embedding. vocab: width of the logits. scale: by which
    those of its head are multiplied.
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
        """The linear from [..., hidden] to [..., vocab]; looked up anew, for kernels may have replaced it."""
        lm_head: nn.Module = self._model.get_output_embeddings()
        return lm_head

    @property
    def lm_head_weight(self) -> Tensor:
        """[vocab, hidden] of the head, to start heads of one's own from; of a quantised one, what it multiplies by."""
        weight: Tensor = self.lm_head.weight  # type: ignore[assignment]
        if type(weight.data) is Tensor and weight.is_floating_point():
            return weight.detach()
        units = torch.eye(self.hidden, device=self._model.device, dtype=self._model.dtype)
        said: Tensor = self.lm_head(units) - self.lm_head(torch.zeros_like(units[:1]))  # without a bias
        return said.detach().T

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Of the head, for who lets it learn; none where kernels have packed it."""
        return tuple(self.lm_head.parameters())

    @property
    def embed_weight(self) -> Tensor:
        """[vocab, hidden] the embedding of every token."""
        return self.embed(torch.arange(self.vocab, device=self._model.device)).detach()

    def embed(self, tokens: Tensor) -> Tensor:
        """[...] int64 -> [..., hidden], as the table has them."""
        embedded: Tensor = self._model.get_input_embeddings()(tokens)
        return embedded

    def logits(self, states: Tensor) -> Tensor:
        """Final, normed states [..., hidden] -> the target's logits [..., vocab]."""
        return self.scale_logits(self.lm_head(states.to(self._model.dtype)))

    def scale_logits(self, logits: Tensor) -> Tensor:
        """What the model does to the logits of its head: a scale, a soft cap, mostly nothing. Same shape."""
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    @torch.no_grad()
    def _check(self, name: str) -> None:
        """Hear from the head itself that nothing else happens between the final states and the logits."""
        model, seen = self._model, []
        last = int(model.config.get_text_config().num_hidden_layers) - 1
        hook = self.lm_head.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
        try:
            ids = torch.tensor([[0, 1]], device=model.device)
            out, states = forward_with_hidden_states(
                model, [last], input_ids=ids, position_ids=torch.tensor([[0, 1]], device=model.device), use_cache=False
            )
        finally:
            hook.remove()
        self.vocab = int(out.logits.shape[-1])
        final = states[last]
        same = len(seen) == 1 and seen[0][0].shape == final.shape and torch.equal(seen[0][0], final)
        if not same or not torch.allclose(self.scale_logits(seen[0][1]).float(), out.logits.float(), rtol=1e-3, atol=1e-3):
            raise ValueError(f"{name} ({type(model).__name__}) turns its states into logits in a way that heads cannot follow")
