"""images → shards → batches → loss → checkpoint → samples → figures.

The names in `__all__` are for notebooks and scripts (docs/python.md). They are loaded when they are first used, so that
`import pipeline` is cheap. Nothing else is public: modules and their functions may change without notice.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.notebook import Figure, Model, PipelineError, ShardDataset, figures, load_model

    __version__: str

__all__ = ["Figure", "Model", "PipelineError", "ShardDataset", "figures", "load_model"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from pipeline import notebook

        return getattr(notebook, name)
    if name == "__version__":
        from pipeline.monitoring.machine import own_version

        return own_version()
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}; public are {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
