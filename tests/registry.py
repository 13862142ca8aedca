"""All flavours of LoRA that are trained and counted."""

from flavours import FLAVOURS as PLAIN
from flavours_quantised import QUANTISED

FLAVOURS = {**PLAIN, **QUANTISED}
