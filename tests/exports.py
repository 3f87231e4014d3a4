"""Heads for tests of exports: random ones of small targets, exported, and imported again."""

from pathlib import Path

import pytest
import torch

from headstart import formats
from headstart.drafters.eagle3 import Eagle3, Eagle3Config
from headstart.drafters.mtp import Mtp, MtpConfig
from headstart.drafters.parts.decoder import block_of
from headstart.formats.exports import EXPORTERS
from headstart.formats.exports.base import Subject
from headstart.formats.importing import import_heads
from headstart.target.embed_head import EmbedHead
from headstart.target.loading import load_model
from headstart.target.tokenizer_loading import load_tokenizer


def subject_of(source, make, dtype=None, **settings):
    """What an exporter is given: heads for the model in a folder. make: `eagle3` or `mtp`; settings: of the heads."""
    model = load_model(source, "auto", "cpu")
    info = formats.describe_target(model, load_tokenizer(source))
    torch.manual_seed(1)
    heads = make(model.config, info.vocab, settings)
    with torch.no_grad():
        for weight in heads.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    heads.to(model.dtype)
    for name, tensor in [*heads.named_parameters(), *heads.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            tensor.data = tensor.float()  # transformers keeps it in float32, whatever the dtype of a model
    return Subject(heads.eval().bind(EmbedHead(model)), info, model, str(source), dtype)


def eagle3(config, vocab, settings):
    """EAGLE-3 heads that llama.cpp can run, but for these settings, with a draft vocabulary that begins in the middle."""
    plain = {"fc_norm": False, "norm_output": False, "taps": (0, 1, 2), "draft_vocab": 40}
    resolved = Eagle3.resolve_config(Eagle3Config.model_validate({**plain, **settings}), config)
    heads = Eagle3(resolved, config.hidden_size, vocab)
    if heads.ids is not None:
        heads.ids.copy_(torch.randperm(vocab)[: len(heads.ids)].sort().values)
    return heads


def mtp(config, vocab, settings):
    """MTP modules with a layer like the target's last one."""
    return Mtp(MtpConfig.model_validate({"block": block_of(config.get_text_config()), **settings}), config.hidden_size, vocab)


def exported(subject, engine, folder: Path):
    """Write an export, and return what was placed."""
    folder.mkdir(parents=True)
    EXPORTERS[engine].check(subject)
    return EXPORTERS[engine].write(subject, folder)


def refusal(subject, engine):
    """The sentence with which an export is refused."""
    with pytest.raises(ValueError, match=r"^[^\n]+$") as refused:
        EXPORTERS[engine].check(subject)
    return str(refused.value)


def assert_same_heads(subject, source, target, folder):
    """Import an export and compare every bit of its tensors with those of the heads. target: None: the source itself."""
    import_heads(str(source), target and str(target), str(folder))
    back, heads = formats.load(folder), subject.heads
    expected, actual = heads.state_dict(), back.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype is tensor.dtype, name
        assert torch.equal(actual[name], tensor), name
    return back
