"""Several adapters side by side: their modules together, a missing one being an update of zero."""

from collections.abc import Sequence

from tclora.adapter.factors import Adapter, LoraFactors
from tclora.errors import AdapterError


def check_adapters(adapters: Sequence[Adapter]) -> None:
    """Refuse an empty list, repeated names, no modules at all, and factors that are not finite.

    Raises
    ------
    AdapterError
        Naming the adapter, and the module where there is one.
    """
    names = [adapter.name for adapter in adapters]
    if not names:
        raise AdapterError("adapters must be at least one, got none")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise AdapterError(
            f"adapter names must differ, got {', '.join(repeated)} twice; name them on reading"
        )
    if not any(adapter.modules for adapter in adapters):
        raise AdapterError(f"adapters must update at least one module, got none in {names}")
    for adapter in adapters:
        check_finite(adapter)


def check_finite(adapter: Adapter) -> None:
    """Refuse an adapter with a factor that holds NaN or infinity; reads every module once."""
    for module in adapter.modules:
        B, A = adapter.modules[module]
        if not (B.isfinite().all() and A.isfinite().all()):
            raise AdapterError(
                f"{adapter.name}: factors of {module} must be finite, got NaN or infinity; "
                "train it again with a smaller step or leave it out"
            )


def module_names(adapters: Sequence[Adapter]) -> list[str]:
    """Return every module that at least one adapter updates, sorted."""
    return sorted({module for adapter in adapters for module in adapter.modules})


def module_factors(adapters: Sequence[Adapter], module: str) -> list[LoraFactors]:
    """Read one module's factors from each adapter; a missing module is an update of rank zero.

    Parameters
    ----------
    adapters : sequence of K Adapter
        At least one must update the module.
    module : str
        Module path.

    Returns
    -------
    list of K LoraFactors

    Raises
    ------
    AdapterError
        If the adapters disagree on the module's shape.
    """
    found = [adapter.modules.get(module) for adapter in adapters]
    shapes = {f.shape: a.name for f, a in zip(found, adapters, strict=True) if f is not None}
    if len(shapes) > 1:
        (one, first), (other, second), *_ = shapes.items()
        raise AdapterError(
            f"{module} must have one shape in all adapters, got {one} in {first!r} and {other} in "
            f"{second!r}; merge only adapters of one base model"
        )
    example = next(f for f in found if f is not None)
    nothing = LoraFactors(example.B[:, :0], example.A[:0])
    return [nothing if f is None else f for f in found]
