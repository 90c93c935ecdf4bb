"""What `Engine.run(callbacks=[...])` can call after each step.

A callback is any function of (engine, reports); these are some that are ready. `import mlo` does not import this
package; write `import mlo.callbacks`.
"""

from mlo.callbacks.logger import Logger

__all__ = ["Logger"]
