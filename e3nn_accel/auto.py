"""Import this module to enable: `import e3nn_accel.auto`, anywhere, before or after e3nn.

It does what `e3nn_accel.enable()` does with the options of the `E3NN_ACCEL_*` variables. It imports
neither e3nn nor torch: if e3nn is not there yet, enabling happens when the program imports it.
Should enabling fail, a warning says why and e3nn stays as it is (`E3NN_ACCEL=strict`: raises).
`e3nn_accel.disable()` takes it back.
"""

from __future__ import annotations

import e3nn_accel
from e3nn_accel._start._e3nn_accel_boot import call_guarded

call_guarded(e3nn_accel.enable)
