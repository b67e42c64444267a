"""What a type checker knows of the public names: a program that uses them is checked."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from aia_kernels import models

ROOT = Path(__file__).parents[2]

#: A type that is lost shows: it is Any to assert_type, and a function without types must not be called.
PROGRAM = """
# mypy: disallow-untyped-calls, disallow-any-unimported
from typing import assert_type

from torch import Tensor, nn

import aia_kernels
from aia_kernels import backends, functional, models
from aia_kernels.convert import Report


def uses(x: Tensor, model: nn.Module, gate: functional.Gate, norm: functional.Norm) -> None:
    assert_type(functional.C(x, gate), Tensor)
    assert_type(functional.ST(x, gate, gate, gate), Tensor)
    assert_type(functional.CinST(x, gate, gate, gate, gate), Tensor)
    assert_type(functional.attention_in_attention(x, "C", [gate]), Tensor)
    assert_type(functional.external_attention(x, x, x, heads=2, eps=1e-6, padding_mask=x), Tensor)
    assert_type(functional.external_attention_block(x, x, x, norm), Tensor)
    assert_type(functional.double_normalize(x), Tensor)
    assert_type(functional.temporal_shift(x, fold_div=4), Tensor)
    assert_type(aia_kernels.CinST(num_segments=8).forward(x), Tensor)
    assert_type(aia_kernels.ExternalAttention2d(512).forward(x), Tensor)
    assert_type(aia_kernels.convert(model), Report)
    assert_type(aia_kernels.to_reference(model), nn.Module)
    assert_type(aia_kernels.available_backends("external_attention"), dict[str, str | None])
    assert_type(backends.chosen_backend(), str)
    assert_type(backends.select("cpu", x.dtype, "temporal_shift"), str)
    assert_type(models.aia_resnet50(num_segments=8, unit="CinST"), models.AIAResNet)
    assert_type(models.eamlp_7(num_classes=10), models.EAMLP)
    with aia_kernels.use_backend("cpu") as nothing:
        assert_type(nothing, None)
    aia_kernels.decompositions()
"""


def test_a_program_that_uses_the_public_names_is_checked(tmp_path):
    pytest.importorskip("mypy")
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("the sources are not here, only the package")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    result = subprocess.run(
        [sys.executable, "-m", "mypy", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout


def test_a_checker_finds_every_network():
    """They are imported on their first use, which a checker cannot follow: a stub beside the module tells it."""
    stub = Path(models.__file__).with_suffix(".pyi")
    imports = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ImportFrom)]
    assert sorted(alias.asname for node in imports for alias in node.names) == models.__all__
