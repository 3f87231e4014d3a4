"""Published MTP modules for tests: rewritten folders, the drafter that is read from one, and the drafts that are accepted."""

import json
import shutil

import pytest
import torch
from transformers.generation.candidate_generator import MTPCandidateGenerator

from headstart import formats
from headstart.engine.drafter_loading import make
from headstart.engine.engine import Engine
from headstart.speculation.params import SamplingParams
from headstart.target.hidden_states import TAKES_A_LIST

PROMPT = [5, 9, 3, 77, 12, 40, 8, 21, 33, 60]
needs_modules = pytest.mark.skipif(
    not TAKES_A_LIST, reason="transformers before 5.23 makes its own MTP modules of fewer configurations; ours do not need them"
)


def rewritten(published, folder, tensors, **config):
    """A copy of a published model with other tensors of modules, and other entries in its configuration."""
    shutil.copytree(published.folder, folder, dirs_exist_ok=True)
    published.write(tensors, folder=folder)
    original = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(original | config))
    return folder


def read(published, folder):
    return formats.inside(folder).read(formats.describe_target(published.model), published.model.config)


def decoded(target, planner=None):
    """The tokens after `PROMPT`, drafted by the target's own modules, and the number of drafts accepted in each round."""
    engine = Engine(target, make("mtp", target), planner)
    request = engine.add(PROMPT, SamplingParams(max_tokens=24, ignore_eos=True))
    rounds = []
    while request.finish_reason is None:
        rounds.append(sum(len(event.tokens) for event in engine.step()) - 1)
    return list(request.output), rounds


def kept_by_transformers(model, monkeypatch):
    """The tokens that `generate(use_mtp=True)` gives, the prompt's included, and the drafts that it accepts in each round."""
    original, kept = MTPCandidateGenerator.get_candidates, []

    def record(self, *args, is_first_iteration, n_last_matches, **rest):
        kept.extend([] if is_first_iteration else [int(n_last_matches)])
        return original(self, *args, is_first_iteration=is_first_iteration, n_last_matches=n_last_matches, **rest)

    monkeypatch.setattr(MTPCandidateGenerator, "get_candidates", record)
    tokens = model.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False, use_mtp=True)[0].tolist()
    return tokens, kept
