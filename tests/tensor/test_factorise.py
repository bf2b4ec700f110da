import logging

import pytest
import torch

from tclora.adapter import Adapter, LoraFactors
from tclora.errors import AdapterError, LibraryError
from tclora.tensor import (
    LibraryFactors,
    component_diagnostics,
    core_consistency,
    cp_als,
    explained_variance_curve,
    factorise,
    shared_share,
    smallest_ranks,
)

SHAPES = {"layers.0.q": (20, 16), "layers.0.up": (30, 16), "layers.1.q": (20, 16)}


def adapter(name, rank=3, shapes=SHAPES, seed=0, shared=0.0):
    generator = torch.Generator().manual_seed(seed)
    common = torch.Generator().manual_seed(99)

    def draw(*shape):
        own = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return own + shared * torch.randn(*shape, generator=common, dtype=torch.float64)

    modules = {m: LoraFactors(draw(o, rank), draw(rank, i)) for m, (o, i) in shapes.items()}
    return Adapter(name, modules, "base")


@pytest.fixture
def adapters():
    return [adapter(f"a{k}", seed=k, shared=1.0) for k in range(4)]


def deltas(adapters, module):
    return torch.stack([a.modules[module].delta() for a in adapters])


def test_total_rank_reproduces_every_adapter_and_says_that_it_clamped(adapters, caplog):
    with caplog.at_level(logging.WARNING):
        factors = factorise(adapters, 50)
    assert "3 of 3 modules" in caplog.text
    assert factors.explained_variance == pytest.approx(1)
    for one in adapters:
        again = factors.reconstruct(one.name)
        for module in SHAPES:
            torch.testing.assert_close(again.modules[module].delta(), one.modules[module].delta())
            assert again.modules[module].rank == 12


def test_explained_variance_is_that_of_the_reconstruction(adapters):
    factors = factorise(adapters, 4)
    lost = total = 0.0
    for module, cp in factors.modules.items():
        X = deltas(adapters, module)
        Y = deltas([factors.reconstruct(a.name) for a in adapters], module)
        ratio = ((X - Y).norm() / X.norm()) ** 2
        assert cp.explained_variance == pytest.approx(1 - float(ratio), abs=1e-8)
        lost, total = lost + float((X - Y).norm() ** 2), total + float(X.norm() ** 2)
    assert factors.explained_variance == pytest.approx(1 - lost / total, abs=1e-8)


def test_explained_variance_of_one_adapter_is_that_of_its_reconstruction(adapters):
    factors = factorise(adapters, 4)
    for adapter in adapters:
        back = factors.reconstruct(adapter.name)
        lost = sum(float((back.modules[m].delta() - f.delta()).square().sum())
                   for m, f in adapter.modules.items())  # fmt: skip
        energy = sum(float(f.delta().square().sum()) for f in adapter.modules.values())
        assert factors.explained_variance_of(adapter) == pytest.approx(1 - lost / energy)
    with pytest.raises(ValueError, match="adapter must be one of"):
        factors.explained_variance_of(Adapter("other", adapters[0].modules))


def test_explained_variance_of_an_adapter_without_energy_is_one(adapters):
    nothing = {m: LoraFactors(0 * f.B, f.A) for m, f in adapters[0].modules.items()}
    zero = Adapter("zero", nothing, "base")
    assert factorise([zero, *adapters[1:]], 4).explained_variance_of(zero) == 1.0


@pytest.mark.parametrize("rank", [4, 100])
def test_normalised_adapters_count_alike_whatever_their_size(adapters, rank):
    """A small adapter vanishes in the fit unless its share of the energy is made the others'."""
    small = {m: LoraFactors(1e-3 * f.B, f.A) for m, f in adapters[1].modules.items()}
    shrunk = [adapters[0], Adapter(adapters[1].name, small, "base"), *adapters[2:]]
    plain = factorise(shrunk, rank)
    fair, full = (factorise(some, rank, normalise=True) for some in (shrunk, adapters))
    for one, other in zip(shrunk, adapters, strict=True):
        assert fair.explained_variance_of(one) == pytest.approx(
            full.explained_variance_of(other), abs=1e-6
        )
    if rank == 4:
        assert plain.explained_variance_of(shrunk[1]) < 0.2 < fair.explained_variance_of(shrunk[1])
        assert plain.explained_variance > fair.explained_variance
    for module, cp in fair.modules.items():
        assert cp.C.sum(0).min() >= 0
        assert cp.C.norm(dim=0).diff().max() <= 0  # sorted by energy
        back = torch.stack([fair.reconstruct(a.name).modules[module].delta() for a in shrunk])
        given = torch.stack([a.modules[module].delta() for a in shrunk])
        lost = (back - given).square().sum() / given.square().sum()
        assert cp.explained_variance == pytest.approx(1 - float(lost), abs=1e-9)


def test_splitting_an_update_differently_changes_nothing(adapters):
    M = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    mixed = [
        Adapter(
            a.name,
            {m: LoraFactors(f.B @ M, torch.linalg.solve(M, f.A)) for m, f in a.modules.items()},
        )
        for a in adapters
    ]
    one, two = factorise(adapters, 4), factorise(mixed, 4)
    assert one.explained_variance == pytest.approx(two.explained_variance, abs=1e-4)


def test_adapters_of_different_ranks_and_targets_are_factorised_over_the_union():
    small = {"layers.0.q": SHAPES["layers.0.q"]}
    mixed = [adapter("wide", 4), adapter("narrow", 2, shapes=small, seed=1)]
    factors = factorise(mixed, 6)
    assert list(factors.modules) == sorted(SHAPES)
    narrow = factors.reconstruct("narrow")
    torch.testing.assert_close(
        narrow.modules["layers.0.q"].delta(), mixed[1].modules["layers.0.q"].delta()
    )
    assert not narrow.modules["layers.0.up"].delta().any()
    assert factors.modules["layers.0.up"].rank == 4


def test_save_and_load_keep_everything(adapters, tmp_path):
    factors = factorise(adapters, 4)
    factors.save(tmp_path / "factors.safetensors")
    again = LibraryFactors.load(tmp_path / "factors.safetensors")
    assert again.names == factors.names
    assert (again.rank, again.base_model) == (4, "base")
    assert again.explained_variance == pytest.approx(factors.explained_variance)
    for module, cp in factors.modules.items():
        torch.testing.assert_close(again.modules[module].U, cp.U.float())
        torch.testing.assert_close(again.modules[module].C, cp.C.float())


def test_equal_factors_are_equal_bytes(adapters, tmp_path):
    factors = factorise(adapters, 4)
    for number in range(8):
        factors.save(tmp_path / f"{number}.safetensors")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_a_file_that_is_not_factors_is_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"nonsense")
    with pytest.raises(LibraryError, match="cannot be read"):
        LibraryFactors.load(file)
    with pytest.raises(LibraryError, match="cannot be read"):
        LibraryFactors.load(tmp_path / "missing.safetensors")


def test_arguments_are_checked(adapters):
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        factorise(adapters, 0)
    with pytest.raises(AdapterError, match="none"):
        factorise([], 2)
    with pytest.raises(AdapterError, match="a0 twice"):
        factorise([adapters[0], adapters[0]], 2)
    with pytest.raises(ValueError, match="adapter must be one of a0"):
        factorise(adapters, 2).reconstruct("nobody")


def test_progress_ends_at_the_number_of_modules(adapters):
    seen = []
    factorise(adapters, 2, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (3, 3)


def test_the_curve_rises_with_rank_and_ends_at_one(adapters):
    curve = explained_variance_curve(adapters, (4, 1, 2, 8, 12))
    assert list(curve.columns) == ["module", "rank", "explained_variance"]
    assert set(curve["module"]) == {*SHAPES, "overall"}
    for _, rows in curve.groupby("module"):
        assert list(rows["rank"]) == [1, 2, 4, 8, 12]
        assert rows["explained_variance"].is_monotonic_increasing
        assert rows["explained_variance"].iloc[-1] == pytest.approx(1)
    overall = curve[curve["module"] == "overall"].set_index("rank")["explained_variance"]
    assert overall[4] == pytest.approx(factorise(adapters, 4).explained_variance, abs=0.02)


def test_diagnostics_tell_shared_from_own():
    same = [adapter("a", seed=1), adapter("b", seed=1)]
    own = [adapter("a", seed=1), adapter("b", seed=2)]
    assert shared_share(factorise(same, 3)) == pytest.approx(1, abs=1e-6)
    assert shared_share(factorise(own, 6)) < 0.2
    assert shared_share(factorise(own[:1], 3)) == 0
    frame = component_diagnostics(factorise(own, 6))
    assert len(frame) == 18
    assert frame["spread"].between(1, 2).all()
    assert frame.groupby("module")["energy_share"].sum().tolist() == pytest.approx([1, 1, 1])


def test_ranks_chosen_by_explained_variance(adapters):
    curve = explained_variance_curve(adapters, (1, 2, 4, 8, 12))
    ranks = smallest_ranks(curve, 0.8)
    overall = ranks.pop("overall")
    assert factorise(adapters, overall).explained_variance >= 0.8
    factors = factorise(adapters, ranks)
    assert {module: cp.rank for module, cp in factors.modules.items()} == ranks
    assert all(cp.explained_variance >= 0.79 for cp in factors.modules.values())
    with pytest.raises(ValueError, match=r"which layers\.0\.q does not reach at 2"):
        smallest_ranks(explained_variance_curve(adapters, (1, 2)), 0.99)
    with pytest.raises(ValueError, match=r"none for layers\.0\.q"):
        factorise(adapters, {"layers.1.q": 2})


def test_core_consistency_tells_a_trilinear_stack_from_one_that_is_not():
    """By definition: the least-squares Tucker core of a planted CP is superdiagonal."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    U, V, C = draw(1, 12, 3), draw(1, 10, 3), draw(1, 5, 3)
    B = (U[:, None] * C[:, :, None]).contiguous()
    A = V.mT[:, None].expand(-1, 5, -1, -1).contiguous()
    exact = cp_als(B, A, 3, n_iter=500, tol=1e-12)
    assert float(core_consistency(B, A, exact)) == pytest.approx(100, abs=1e-3)
    noisy = torch.cat([B, 0.1 * draw(1, 5, 12, 10)], dim=3)
    rest = torch.cat([A, torch.eye(10, dtype=torch.float64).expand(1, 5, -1, -1)], dim=2)
    found = cp_als(noisy, rest, 4, n_iter=500)  # one component too many
    dense = (noisy @ rest)[0]
    core = torch.einsum(
        "ck,um,vn,kmn->cuv",
        *(torch.linalg.pinv(f[0]) for f in (found.C, found.U, found.V)), dense,
    )  # fmt: skip
    ideal = torch.zeros(4, 4, 4, dtype=torch.float64)
    ideal[range(4), range(4), range(4)] = 1
    wanted = 100 * (1 - float((core - ideal).square().sum()) / 4)
    assert float(core_consistency(noisy, rest, found)) == pytest.approx(wanted)
    assert wanted < 0


def test_the_number_of_threads_does_not_change_the_factors(adapters):
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(factorise(adapters, 4))
    torch.set_num_threads(before)
    for module, cp in found[0].modules.items():
        assert torch.equal(cp.U, found[1].modules[module].U)
        assert torch.equal(cp.C, found[1].modules[module].C)
