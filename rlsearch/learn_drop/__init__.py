"""Learn&Drop: when a layer stops learning, and how it leaves the forward pass.

Source: Cruciata et al., "Learn&Drop: Fast Learning of CNNs based on Layer Dropping" (arXiv 2604.23403). The paper
publishes the idea and its results; the score, the rule of the cut and the stored features here are our reconstruction.
"""

from rlsearch.learn_drop.dropper import Dropper
from rlsearch.learn_drop.features import FeatureCache

__all__ = ["Dropper", "FeatureCache"]
