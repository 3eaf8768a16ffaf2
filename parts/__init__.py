"""What the eight files of the method stand on. Imported first of all, before torch: how its threads wait can
only be said before it is loaded."""
import os

# OpenMP's threads spin at barriers, by default for so long that a busy process beside them makes a step three
# times as slow; asleep at once, they take half as long again when alone. A short spin is no slower alone, and
# twice as slow beside one busy process, on two cores (libgomp; results/log.md).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
