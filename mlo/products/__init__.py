"""How the Hessian–vector and mixed products of a solve are formed."""

from mlo.products.base import Linearisation, Product
from mlo.products.central_differences import CentralDifferences
from mlo.products.double_backward import DoubleBackward
from mlo.products.forward_over_reverse import ForwardOverReverse

__all__ = ["CentralDifferences", "DoubleBackward", "ForwardOverReverse", "Linearisation", "Product"]
