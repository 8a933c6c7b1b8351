#!/usr/bin/env bash
# Expected: a 16-bit greyscale picture, converted to 8 bits, keeps its shades.
# Happens: Image.convert("L") clips at 255 instead of scaling: a ramp from 0 to 65,535 becomes white but for one pixel
# in 256. A scanned digit in such a PNG is a white sheet.
# Seen with Pillow 13.0.0: ramp of 16 shades from 0 to 65,535 becomes [0, 255, 255, ..].
# Exit code 0: it still happens. pip needs a network.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet pillow==13.0.0 numpy
"$folder/env/bin/python" - <<'EOF'
import sys

import numpy as np
import PIL
from PIL import Image

ramp = np.linspace(0, 65_535, 16).astype(np.uint16).reshape(1, 16)
grey = np.asarray(Image.fromarray(ramp).convert("L"))[0].tolist()
print(f"Pillow {PIL.__version__}: {ramp[0].tolist()} becomes {grey}")
sys.exit(grey != [0] + [255] * 15)
EOF
