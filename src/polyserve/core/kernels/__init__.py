"""The core's compiled loops. Each has a plain twin (named in its docstring) that a property test holds it to."""

from polyserve.core.kernels.books import *  # noqa: F403
from polyserve.core.kernels.laws import *  # noqa: F403
from polyserve.core.kernels.layout import *  # noqa: F403
from polyserve.core.kernels.outlook import *  # noqa: F403
from polyserve.core.kernels.search import *  # noqa: F403
