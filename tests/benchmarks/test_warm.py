"""Triton's cache is filled in the order in which the benchmarks will want it, by all processes together."""

from __future__ import annotations

import argparse

import pytest

from aia_kernels import backends

pytest.importorskip("tqdm", reason="the benchmarks show their progress with tqdm")

from benchmarks import run, warm


def options(**given) -> argparse.Namespace:
    found = {"device": "cpu", "family": None, "filter": "", "quick": True, "passes": False, "processes": 1, "share": 0}
    return argparse.Namespace(**found | given)


def test_every_call_that_is_measured_is_made_and_what_matters_comes_first():
    of = options(device="cuda", quick=False)
    found = warm.tasks(of)
    assert list(dict.fromkeys(case for case, _ in found)) == run.chosen_cases(of)
    assert {(case, what) for case, what in found if what == "passes"} == {
        (case, "passes") for case in run.chosen_cases(argparse.Namespace(**vars(of) | {"passes": True}))
    }
    assert [what for case, what in found if case == found[0][0]] == ["step", "eval", "passes"]


def test_the_kernels_of_a_case_are_run_on_triton_and_what_raises_is_told(tmp_path, monkeypatch):
    if (reason := backends.available_backends("external_attention")["triton"]) is not None:
        pytest.skip(reason)
    device = "cpu" if backends._interpreted() else "cuda"
    path, of = tmp_path / "warm.txt", options(device=device, filter="ExternalAttention-60x24")
    called = set()
    passes = backends.passes("triton", "external_attention")
    for name in ("logits", "value_gradient", "moments"):
        one = getattr(passes, name)
        monkeypatch.setattr(passes, name, lambda *a, name=name, one=one, **k: called.add(name) or one(*a, **k))
    assert warm.share(of, path) == 0
    told = [line.split("\t") for line in path.read_text().splitlines()]
    assert [(line[0], line[2]) for line in told] == [("done", what) for what in warm.WHAT]
    assert called == {"logits", "value_gradient"}  # moments are the block's

    monkeypatch.setattr(warm, "do", lambda *_: {}["gone"])
    warm.share(options(device=device, filter="60x24", processes=3, share=1), path)
    assert path.read_text().splitlines()[3:][0].startswith("KeyError: 'gone'\tExternalAttention-60x24")
    assert len(path.read_text().splitlines()) == 4
