"""Chains of Medusa and Hydra heads in vLLM, as a class for its `custom_class` method of speculative decoding."""

from headstart_vllm.proposer import Proposer

__all__ = ["Proposer"]
__version__ = "0.1.0"
