"""The subspace of a matrix: exact, from a random start, from where it was; both sides; what has no energy."""

import pytest
import torch

from luthier_plugins.optimisers.galore.subspace import cold_basis, exact_basis, lift, project, warm_basis

SHAPES = [(96, 200), (200, 96), (96, 96)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def like_a_gradient(shape, seed=0, drift=0.0, noise=0.005):
    """A spectrum that decays over thirty directions, and noise; `drift` turns the directions.

    The 16 leading directions hold 0.91 to 0.96 of the energy: of SmolLM2's gradients 128 hold 0.97 and more.
    """
    m, n = shape
    left, right = (torch.randn(size, 30, generator=generator(seed + k)) for k, size in enumerate((m, n)))
    left += drift * torch.randn(left.shape, generator=generator(seed + 2))
    right += drift * torch.randn(right.shape, generator=generator(seed + 4))
    decay = torch.exp(-torch.arange(30) / 8)
    return (left * decay) @ right.T / (m * n) ** 0.5 + noise * torch.randn(
        shape, generator=generator(seed + 3)
    )


def captured(basis, matrix):
    """The share of the energy that the best basis of the same rank captures; independent of `project`."""
    short = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T).double()
    best = torch.linalg.svdvals(short)[: basis.shape[1]].square().sum()
    return float((basis.double().T @ short).square().sum() / best)


def assert_orthonormal(basis):
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=2e-6)


def test_the_exact_basis_is_worked_out_by_hand():
    # Singular values 3, 2, 1 along known axes; the two largest are e₁ and e₀ on the left, e₂ and e₀ right.
    matrix = torch.zeros(3, 4)
    matrix[1, 2], matrix[0, 0], matrix[2, 3] = 3.0, -2.0, 1.0
    wide, tall = exact_basis(matrix, 2).abs(), exact_basis(matrix.T, 2).abs()
    torch.testing.assert_close(wide, torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(tall, wide)  # the shorter side of Gᵀ is that of G


@pytest.mark.parametrize("shape", SHAPES)
def test_from_a_random_start_nearly_all_energy_is_found(shape):
    matrix = like_a_gradient(shape)
    basis = cold_basis(matrix, 16, generator(7))
    assert basis.shape == (96, 16)
    assert_orthonormal(basis)
    assert captured(basis, matrix) >= 0.99


@pytest.mark.parametrize("shape", SHAPES)
def test_from_a_stale_basis_nearly_all_energy_is_found(shape):
    stale = exact_basis(like_a_gradient(shape), 16)
    matrix = like_a_gradient(shape, drift=1.0)
    assert captured(stale, matrix) < 0.9
    basis = warm_basis(matrix, stale)
    assert_orthonormal(basis)
    assert captured(basis, matrix) >= 0.99


@pytest.mark.parametrize("factor", [1e-20, 1.0, 1e15])
def test_the_size_of_a_gradient_does_not_matter(factor):
    matrix = like_a_gradient((96, 200))
    basis = cold_basis(matrix * factor, 16, generator())
    assert captured(basis, matrix) >= 0.99


def test_bf16_gradients_are_taken():
    matrix = like_a_gradient((96, 200)).bfloat16()
    for basis in (cold_basis(matrix, 16, generator()), exact_basis(matrix, 16)):
        assert basis.dtype == torch.float32
        assert captured(basis, matrix.float()) >= 0.99


def test_a_basis_of_the_same_matrix_stays_with_its_signs():
    matrix = torch.diag(torch.tensor([16.0, 8.0, 4.0, 0.01, 0.01])) @ torch.eye(5, 9)
    last = torch.eye(5, 3) * torch.tensor([1.0, -1.0, 1.0])
    torch.testing.assert_close(warm_basis(matrix, last), last, rtol=0, atol=1e-3)


def test_without_any_gradient_the_basis_stays():
    last = exact_basis(like_a_gradient((96, 200)), 16)
    torch.testing.assert_close(warm_basis(torch.zeros(96, 200), last), last, rtol=0, atol=1e-5)


def test_fewer_directions_than_the_rank_still_give_a_basis():
    matrix = torch.outer(torch.arange(1.0, 9.0), torch.ones(12))
    basis = cold_basis(matrix, 4, generator())
    assert_orthonormal(basis)
    assert captured(basis, matrix) >= 0.9999


def test_a_decomposition_that_does_not_converge_is_replaced(monkeypatch):
    def fails(*args, **options):
        raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")

    matrix = like_a_gradient((96, 200))
    best = exact_basis(matrix, 16)
    monkeypatch.setattr(torch.linalg, "svd", fails)
    assert captured(exact_basis(matrix, 16), matrix) >= 0.99 * captured(best, matrix)


@pytest.mark.parametrize("shape", SHAPES)
def test_projecting_and_lifting_are_the_papers_products(shape):
    matrix, basis = like_a_gradient(shape), exact_basis(like_a_gradient(shape), 40)
    low = project(basis, matrix)
    tall = shape[0] > shape[1]
    expected = (matrix @ basis).T if tall else basis.T @ matrix
    torch.testing.assert_close(low, expected, rtol=1e-5, atol=1e-6)
    back = lift(basis, low, tall)
    assert back.shape == matrix.shape
    torch.testing.assert_close(back, low.T @ basis.T if tall else basis @ low, rtol=1e-5, atol=1e-6)


def test_the_generator_decides_the_start():
    matrix = like_a_gradient((96, 200))
    before = torch.get_rng_state()
    first, again, other = (cold_basis(matrix, 16, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
