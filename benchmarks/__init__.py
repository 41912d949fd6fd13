"""What measures speed, memory and error rates."""

from logging import ERROR, getLogger

# On some processors it asks the hub for a kernel when it is imported, and warns at length that there is none.
getLogger("bitsandbytes").setLevel(ERROR)
