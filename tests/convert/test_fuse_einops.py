"""fuse: external attention that einops arranges."""

from __future__ import annotations

import copy

import pytest
import torch
from convert_cases import EXACT
from fuse_steps import assert_same_steps, build, inputs_of

import aia_kernels

pytest.importorskip("einops")

from einops_wordings import EINOPS


@pytest.mark.parametrize("kind", EINOPS, ids=lambda kind: kind.__name__)
def test_is_found_and_computes_the_same(kind, monkeypatch):
    expected, *shapes = EINOPS[kind]
    model = build(kind)
    own = copy.deepcopy(model)
    report = aia_kernels.fuse(model)
    assert [entry.now for entry in report.converted] == [expected], report
    for training in (True, False):
        model.train(training)
        own.train(training)
        assert_same_steps(model, own, inputs_of(shapes), **EXACT)
    monkeypatch.setattr(kind, "forward", None)  # it is not called, whatever the sizes
    model(*(torch.randn(5, *(n if n == 6 else n + 3 for n in shape[1:]), dtype=torch.float64) for shape in shapes))
