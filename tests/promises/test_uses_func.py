"""Layers under torch.func and other derivatives: transforms, forward mode, second derivatives, hooks on the graph.

These take the reference where a pass cannot be followed, so sums come in another order: float64 within EXACT.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap
from uses_layers import (
    EXACT,
    LAYERS,
    MAIN,
    WITHOUT_DROPOUT,
    assert_close,
    batch,
    every_layer,
    every_layer_without_dropout,
    layer,
    towards,
)

DOUBLE = torch.float64
main_layers_without_dropout = pytest.mark.parametrize("name", [name for name in MAIN if name in WITHOUT_DROPOUT])
with_dropout = pytest.mark.parametrize("name", ["MultiHead, dropout", "Token, dropout"])


def fixed(name: str) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """A layer in evaluation, x, and the layer's parameters by name, apart from the layer."""
    module = layer(name, DOUBLE).eval()
    return module, batch(name, DOUBLE), {key: p.detach() for key, p in module.named_parameters()}


def loss_of(module: nn.Module, parameters: dict[str, Tensor], x: Tensor, grad_y: Tensor) -> Tensor:
    return (functional_call(module, parameters, (x,)) * grad_y).sum()


def gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Those of loss_of, in plain eager."""
    x = x.detach().requires_grad_()
    parameters = dict(module.named_parameters())
    y = module(x)
    found = torch.autograd.grad(y, (x, *parameters.values()), towards(y))
    return dict(zip(("x", *parameters), found, strict=True))


@every_layer
def test_grad(name):
    """With dropout too, in training, from the same seed: the mask is the same one. Batch norms are in evaluation, as
    torch.func.grad lets no buffer move."""
    module, x, parameters = fixed(name)
    if LAYERS[name].draws:
        module.train()

    def loss(parameters, x):
        y = functional_call(module, parameters, (x,))
        return (y * towards(y)).sum(), y

    torch.manual_seed(2)
    (of_parameters, of_x), _ = grad(loss, argnums=(0, 1), has_aux=True)(parameters, x)
    torch.manual_seed(2)
    assert_close({"x": of_x} | of_parameters, gradients(module, x))


@every_layer_without_dropout
def test_vjp(name):
    module, x, parameters = fixed(name)
    y, pull = vjp(lambda parameters, x: functional_call(module, parameters, (x,)), parameters, x)
    of_parameters, of_x = pull(towards(y))
    assert_close({"x": of_x} | of_parameters, gradients(module, x))


@every_layer_without_dropout
def test_forward_mode_in_everything(name):
    """Along tangents of x and of all parameters at once: the sum of the gradients' products with them."""
    module, x, parameters = fixed(name)
    tangents = {key: torch.randn_like(p) for key, p in parameters.items()}, torch.randn_like(x)
    grad_y = towards(module(x))
    _, found = jvp(lambda parameters, x: loss_of(module, parameters, x, grad_y), (parameters, x), tangents)
    along = tangents[0] | {"x": tangents[1]}
    expected = sum((g * along[key]).sum() for key, g in gradients(module, x).items())
    torch.testing.assert_close(found, expected, **EXACT)
    with forward_ad.dual_level():
        dual = {key: forward_ad.make_dual(p, tangents[0][key]) for key, p in parameters.items()}
        of_duals = forward_ad.unpack_dual(loss_of(module, dual, forward_ad.make_dual(x, tangents[1]), grad_y)).tangent
    torch.testing.assert_close(of_duals, expected, **EXACT)


@main_layers_without_dropout
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch.fx of its own constants
def test_linearize(name):
    module, x, _ = fixed(name)
    tangent = torch.randn_like(x)
    y, push = linearize(module, x)
    torch.testing.assert_close(push(tangent), jvp(module, (x,), (tangent,))[1], **EXACT)
    torch.testing.assert_close(y, module(x), **EXACT)


@main_layers_without_dropout
def test_jacobians(name):
    """jacrev and jacfwd agree, and the gradient is the Jacobian's product."""
    module, x, _ = fixed(name)
    corner = x.flatten()[:5]

    def outputs(corner):
        return module(torch.cat((corner, x.flatten()[5:])).view(x.shape)).flatten()[:7]

    by_rows, by_columns = jacrev(outputs)(corner), jacfwd(outputs)(corner)
    torch.testing.assert_close(by_rows, by_columns, **EXACT)
    leaf = corner.clone().requires_grad_()
    for i, row in enumerate(by_rows):
        torch.testing.assert_close(torch.autograd.grad(outputs(leaf)[i], leaf)[0], row, **EXACT)


@every_layer_without_dropout
def test_vmap(name):
    module, x, _ = fixed(name)
    xs = torch.stack([x, batch(name, DOUBLE, seed=3)], 1)
    found = vmap(module, in_dims=1, out_dims=-1)(xs)
    for i in range(2):
        torch.testing.assert_close(found[..., i], module(xs[:, i]), **EXACT)


@main_layers_without_dropout
def test_gradients_per_sample(name):
    module, x, parameters = fixed(name)
    size = 3 if "ST" in name or name in ("C", "TemporalShift") else 1
    samples = x.unflatten(0, (-1, size)) if x.ndim == 4 else x.unsqueeze(1)
    grad_y = towards(module(samples[0]))
    per_sample = vmap(grad(lambda p, sample: loss_of(module, p, sample, grad_y)), in_dims=(None, 0))
    found = per_sample(parameters, samples)
    for i, sample in enumerate(samples):
        expected = gradients(module, sample)
        del expected["x"]
        assert_close({key: g[i] for key, g in found.items()}, expected)


@pytest.mark.parametrize("name", [name for name in MAIN if any(True for _ in layer(name).parameters())])
def test_ensemble(name):
    modules = [layer(name, DOUBLE).eval() for _ in range(2)]
    with torch.no_grad():
        for p in modules[1].parameters():
            p.mul_(0.5)
    parameters, buffers = stack_module_state(modules)
    x = batch(name, DOUBLE)
    found = vmap(lambda p, b: functional_call(modules[0], (p, b), (x,)))(parameters, buffers)
    for i, module in enumerate(modules):
        torch.testing.assert_close(found[i], module(x), **EXACT)


@with_dropout
def test_randomness_of_vmap(name):
    """One mask for all, or one for each, or an error: as vmap's randomness says."""
    module = layer(name, DOUBLE)
    x = batch(name, DOUBLE)
    xs = x.expand(4, *x.shape)
    same = vmap(module, randomness="same")(xs)
    for y in same:
        torch.testing.assert_close(y, same[0], **EXACT)
    different = vmap(module, randomness="different")(xs)
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(different) for b in different[:i])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(module, randomness="error")(xs)
    # What is kept is scaled so that the mean stays: of many draws it is near y without dropout.
    many = vmap(module, randomness="different")(x.expand(600, *x.shape))
    deviation = (many.mean(0) - module.eval()(x)).abs()
    # Six standard errors in each of 200 places: by chance once in two million runs.
    assert (deviation <= 6 * many.std(0) / 600**0.5 + 1e-12).all()


@with_dropout
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_gradients_of_dropout_per_sample(name, randomness):
    """A sample's gradient is that of its own mask: y is linear in the value memory, gradient times memory gives y."""
    module = layer(name, DOUBLE)
    weight = "linear_1.weight"
    p = {key: torch.zeros_like(q) if key.endswith("bias") else q.detach() for key, q in module.named_parameters()}
    x = batch(name, DOUBLE)

    def loss(value, x):
        y = functional_call(module, p | {weight: value}, (x,))
        branch = y - functional_call(module, p | {weight: torch.zeros_like(value)}, (x,)) if "Token" in name else y
        return branch.sum(), branch.sum()

    if "Token" in name:
        module.proj_drop.p = 0.0
    per_sample = vmap(grad(loss, has_aux=True), in_dims=(None, 0), randomness=randomness)
    grads, losses = per_sample(p[weight], x.expand(3, *x.shape))
    torch.testing.assert_close((grads * p[weight]).sum((1, 2)), losses, **EXACT)
    assert ((losses - losses[0]).abs()[1:] < 1e-11).tolist() == [randomness == "same"] * 2


@every_layer_without_dropout
def test_double_backward(name):
    """The derivative of a gradient's product with a direction, against forward over reverse."""
    module, x, parameters = fixed(name)
    direction = torch.randn_like(x)
    leaf = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(nonlinear(module, {}, leaf), leaf, create_graph=True)
    wanted = (leaf, *module.parameters())
    second = torch.autograd.grad((first * direction).sum(), wanted, allow_unused=True)
    of_x = grad(lambda p, x: nonlinear(module, p, x), argnums=(1, 0))
    _, expected = jvp(lambda x: of_x(parameters, x), (x,), (direction,))
    for key, found in zip(("x", *parameters), second, strict=True):
        value = expected[0] if key == "x" else expected[1][key]
        torch.testing.assert_close(torch.zeros_like(value) if found is None else found, value, **EXACT, msg=key)


def nonlinear(module: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(module, parameters, (x,)).sin().sum()


@main_layers_without_dropout
def test_hessian_vector_products(name):
    """Three ways to the same: vjp of a gradient, torch.autograd.functional, torch.func.hessian on a corner."""
    module, x, _ = fixed(name)
    direction = torch.randn_like(x)
    _, back = vjp(grad(lambda x: nonlinear(module, {}, x)), x)
    (found,) = back(direction)
    _, expected = torch.autograd.functional.hvp(lambda x: nonlinear(module, {}, x), x, direction)
    torch.testing.assert_close(found, expected, **EXACT)
    corner, rest = x.flatten()[:3], x.flatten()[3:]

    def of_corner(corner):
        return nonlinear(module, {}, torch.cat((corner, rest)).view(x.shape))

    flat = torch.zeros(x.numel(), dtype=DOUBLE)
    flat[:3] = direction.flatten()[:3]
    (partial,) = back(flat.view(x.shape))
    torch.testing.assert_close(hessian(of_corner)(corner) @ flat[:3], partial.flatten()[:3], **EXACT)
