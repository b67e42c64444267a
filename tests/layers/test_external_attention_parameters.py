"""Parameters of external attention's layers: names, initialization, checkpoints, copies; and what they refuse."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from agreement import assert_same
from external_layers import LAYERS, LOW, MAIN, inputs, layer, step
from torch import nn

from aia_kernels import ExternalAttention, ExternalAttention2d, MultiHeadExternalAttention


class TestParameters:
    NAMES = {  # noqa: RUF012
        "plain": {"mk.weight": (5, 7), "mv.weight": (7, 5)},
        "block": {
            "conv1.weight": (6, 6, 1, 1),
            "conv1.bias": (6,),
            "linear_0.weight": (5, 6, 1),
            "linear_1.weight": (6, 5, 1),
            "conv2.0.weight": (6, 6, 1, 1),
            "conv2.1.weight": (6,),
            "conv2.1.bias": (6,),
            "conv2.1.running_mean": (6,),
            "conv2.1.running_var": (6,),
            "conv2.1.num_batches_tracked": (),
        },
        "multi-head": {
            "trans_dims.weight": (24, 6),
            "trans_dims.bias": (24,),
            "linear_0.weight": (64, 3),
            "linear_0.bias": (64,),
            "linear_1.weight": (3, 64),
            "linear_1.bias": (3,),
            "proj.weight": (6, 24),
            "proj.bias": (6,),
        },
    }

    @pytest.mark.parametrize("name", MAIN)
    def test_published_names_and_shapes(self, name):
        assert {key: tuple(a.shape) for key, a in layer(name).state_dict().items()} == self.NAMES[name]

    def test_published_signatures(self):
        assert ExternalAttention(512).mk.out_features == ExternalAttention2d(512).k == 64
        module = MultiHeadExternalAttention(384, num_heads=6, qkv_bias=True, qk_scale=0.1, attn_drop=0.2, proj_drop=0.3)
        assert (module.num_heads, module.k, module.coef, module.trans_dims.out_features) == (24, 64, 4, 1536)
        assert (module.attn_drop.p, module.proj_drop.p) == (0.2, 0.3)
        assert MultiHeadExternalAttention(64).num_heads == 32

    def test_initialization_of_the_plain_form(self):
        torch.manual_seed(7)
        linears = nn.Linear(40, 8, bias=False), nn.Linear(8, 40, bias=False)
        for linear in linears:
            nn.init.normal_(linear.weight, std=0.001)
        torch.manual_seed(7)
        module = ExternalAttention(40, S=8)
        assert torch.equal(module.mk.weight, linears[0].weight) and torch.equal(module.mv.weight, linears[1].weight)

    def test_initialization_of_the_block(self):
        """The published memories share storage while they are initialized: the same numbers, in two storages."""
        torch.manual_seed(7)
        conv1 = nn.Conv2d(12, 12, 1)
        linear_0, linear_1 = nn.Conv1d(12, 8, 1, bias=False), nn.Conv1d(8, 12, 1, bias=False)
        linear_1.weight.data = linear_0.weight.data.permute(1, 0, 2)
        conv2 = nn.Conv2d(12, 12, 1, bias=False)
        for conv in (conv1, linear_0, linear_1, conv2):
            conv.weight.data.normal_(0, math.sqrt(2 / (conv.kernel_size[0] * conv.out_channels)))
        torch.manual_seed(7)
        module = ExternalAttention2d(12, k=8)
        for found, expected in (
            (module.conv1, conv1),
            (module.linear_0, linear_0),
            (module.linear_1, linear_1),
            (module.conv2[0], conv2),
        ):
            assert torch.equal(found.weight, expected.weight)
        assert torch.equal(module.conv1.bias, conv1.bias)
        assert torch.equal(module.linear_1.weight, module.linear_0.weight.permute(1, 0, 2))
        assert module.linear_1.weight.is_contiguous()
        assert len({p.untyped_storage().data_ptr() for p in module.parameters()}) == len(list(module.parameters()))

    def test_tied_and_untied_checkpoints_load(self, tmp_path):
        """A published checkpoint may hold memories that share storage; one that does not must not be overwritten."""
        state = layer("block").state_dict()
        tied = state | {"linear_1.weight": state["linear_0.weight"].permute(1, 0, 2)}
        for saved in (state, tied):
            torch.save(saved, tmp_path / "checkpoint.pt")
            module = ExternalAttention2d(6, k=5).double()
            module.load_state_dict(torch.load(tmp_path / "checkpoint.pt"), strict=True)
            for key, value in module.state_dict().items():
                assert torch.equal(value, saved[key])

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
    @pytest.mark.parametrize("name", MAIN)
    def test_copies(self, name, copied):
        module = layer(name)
        other = copied(module)
        x, grad_y = inputs(name)
        assert_same(step(other, x, grad_y), step(module, x, grad_y), rtol=0, atol=0)
        with torch.no_grad():
            next(other.parameters()).add_(1)
        assert not torch.equal(next(other.parameters()), next(module.parameters()))

    @pytest.mark.parametrize("name", MAIN)
    def test_moves_between_types(self, name):
        module = layer(name)
        x, _ = inputs(name)
        for dtype in LOW:
            y = module.to(dtype)(x.to(dtype))
            assert y.dtype == dtype and y.isfinite().all()
        module.to("meta")
        assert module(x.half().to("meta").to(dtype)).shape == x.shape


class TestBadInput:
    @pytest.mark.parametrize(
        "make, words",
        [
            (lambda: ExternalAttention(8, S=0), "S: got 0, expected at least 1"),
            (lambda: ExternalAttention(0), "d_model: got 0, expected at least 1"),
            (lambda: ExternalAttention2d(8, k=0), "k: got 0, expected at least 1"),
            (lambda: ExternalAttention2d(-1), "c: got -1, expected at least 1"),
            (lambda: MultiHeadExternalAttention(10, num_heads=4), "dim: got 10, expected a multiple of num_heads = 4"),
            (lambda: MultiHeadExternalAttention(8, num_heads=0), "num_heads: got 0, expected at least 1"),
        ],
    )
    def test_construction(self, make, words):
        with pytest.raises(ValueError, match=words):
            make()

    @pytest.mark.parametrize(
        "name, change, error",
        [
            ("plain", lambda x: x[0], ValueError),
            ("plain", lambda x: x[..., :-1], ValueError),
            ("plain", lambda x: x.int(), TypeError),
            ("plain", lambda x: x.float(), TypeError),
            ("block", lambda x: x.flatten(1), ValueError),
            ("block", lambda x: x[:, :-1], ValueError),
            ("block", lambda x: x[:1, :, :1, :1], ValueError),
            ("block", lambda x: x.float(), TypeError),
            ("multi-head", lambda x: x[None], ValueError),
            ("multi-head", lambda x: x[..., :-1], ValueError),
            ("multi-head", lambda x: x.to(torch.complex64), TypeError),
        ],
    )
    def test_input(self, name, change, error):
        with pytest.raises(error, match=r"got .*, expected"):
            layer(name)(change(inputs(name)[0]))

    @pytest.mark.parametrize("name", MAIN)
    def test_empty_batch(self, name, backend_on):
        module = layer(name, device=backend_on[1])
        buffers = copy.deepcopy(dict(module.named_buffers()))
        x = torch.zeros(0, *LAYERS[name].sizes[1:], dtype=torch.float64, device=backend_on[1], requires_grad=True)
        y = module(x)
        y.sum().backward()
        assert y.shape == x.shape == x.grad.shape
        if name != "multi-head":  # the bias of proj is there without tokens too, but nobody sees it
            assert all(p.grad.count_nonzero() == 0 for p in module.parameters())
        assert all(torch.equal(b, buffers[key]) for key, b in module.named_buffers())
