#!/usr/bin/env bash
# Expected: an IDX file of 32-bit integers, such as QMNIST's label files, read by idx2numpy, becomes a tensor.
# Happens: bytes are read well, but wider types keep the file's byte order: the array is ">i4", which prints and
# computes as any other, until torch.from_numpy refuses it.
# Seen with idx2numpy 1.2.3, numpy 2, torch 2.14.1: dtype >i4, ValueError: given numpy array has byte order different
# from the native byte order.
# Exit code 0: it still happens. pip needs a network.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 numpy idx2numpy==1.2.3
"$folder/env/bin/python" - <<'EOF'
import struct
import sys
import tempfile

import idx2numpy
import torch

content = struct.pack(">HBBI3i", 0, 0x0C, 1, 3, 7, 1, 2)  # type int32, one dimension of three
with tempfile.NamedTemporaryFile() as file:
    file.write(content)
    file.flush()
    labels = idx2numpy.convert_from_file(file.name)
print(f"dtype {labels.dtype.str}, sum {labels.sum()}")
try:
    print(torch.from_numpy(labels))
    sys.exit(1)
except ValueError as error:
    print(f"ValueError: {error}")
as_seen = labels.dtype.str == ">i4" and int(labels.sum()) == 10
sys.exit(not as_seen)
EOF
