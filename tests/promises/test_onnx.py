"""ONNX: models after to_reference, and decomposed programs, export and compute the same in onnxruntime on the CPU."""

from __future__ import annotations

import pytest
import torch
from conftest import some_of
from torch import nn

import aia_kernels
from aia_kernels import testing
from aia_kernels.reference import UNITS

pytest.importorskip("onnxscript", reason="the exporter of torch.onnx needs onnxscript: pip install 'aia_kernels[test]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'aia_kernels[test]'")

# Two float32 implementations of sums of up to a few hundred terms of order one.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
SEGMENTS = 2


class EveryLayer(nn.Module):
    """The layers of the package on maps [B * T, 8, H, W] and tokens [B, N, 8]; all results side by side."""

    def __init__(self, units):
        super().__init__()
        self.on_maps = nn.ModuleList([getattr(aia_kernels, unit)(SEGMENTS) for unit in units])
        self.on_maps += [aia_kernels.ST(SEGMENTS, use_BN=False), aia_kernels.TemporalShift(SEGMENTS)]
        self.on_maps += [aia_kernels.ExternalAttention2d(8, 6)]
        self.on_tokens = nn.ModuleList(
            [
                aia_kernels.ExternalAttention(8, 6),
                aia_kernels.MultiHeadExternalAttention(8, 2),
                aia_kernels.TokenExternalAttention(8, 8, 6),
            ]
        )

    def forward(self, maps, tokens):
        return (*(layer(maps) for layer in self.on_maps), *(layer(tokens) for layer in self.on_tokens))


def make(units=("CinST", "STinC2")) -> EveryLayer:
    """Two units have every pass of all five; the exporters take seconds for each."""
    return testing.randomise(EveryLayer(units)).eval()


def inputs(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(samples)
    return tuple(torch.randn(s, generator=generator) for s in ((samples * SEGMENTS, 8, 5, 3), (samples, 9, 8)))


def run(path, arguments) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {given.name: a.numpy() for given, a in zip(session.get_inputs(), arguments, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, feed)]


def assert_same(path, expected: nn.Module, samples: int) -> None:
    arguments = inputs(samples)
    with torch.no_grad():
        ys = expected(*arguments)
    for index, (found, y) in enumerate(zip(run(path, arguments), ys, strict=True)):
        torch.testing.assert_close(found, y, **CLOSE, msg=lambda m, index=index: f"output {index}: {m}")


@some_of("fused", ["to_reference", "decomposed"], "decomposed")
def test_with_a_dynamic_batch(fused, tmp_path):
    model, expected, path = make(), make(), tmp_path / "model.onnx"
    samples = torch.export.Dim("samples", min=1, max=64)
    dynamic = {"maps": {0: SEGMENTS * samples}, "tokens": {0: samples}}
    if fused == "to_reference":
        model = aia_kernels.to_reference(model)
    program = torch.export.export(model, inputs(3), dynamic_shapes=dynamic)
    if fused == "decomposed":
        program = program.run_decompositions(aia_kernels.decompositions())
    torch.onnx.export(program, f=path, dynamo=True, verbose=False)
    for count in (3, 5):
        assert_same(path, expected, count)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_through_the_tracing_exporter(tmp_path):
    """The older exporter, which knows one size."""
    path = tmp_path / "model.onnx"
    torch.onnx.export(aia_kernels.to_reference(make(UNITS)), inputs(3), path, dynamo=False)
    assert_same(path, make(UNITS), 3)
