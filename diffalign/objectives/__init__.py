"""Pure losses on log-probabilities; importing the package registers every one of them."""

from diffalign.objectives import pair

__all__ = ["pair"]
