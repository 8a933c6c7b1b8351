"""Scripts that are killed, or whose disk is full, at random moments."""

import faults
import pytest
from conftest import needs_proc


@needs_proc
@pytest.mark.slow
def test_faults_at_random_moments_lose_nothing(mnist_folder, tmp_path):
    found, losses = faults.inflict(8, mnist_folder, tmp_path)
    assert found == {fault: [2, 0] for fault in faults.FAULTS}, losses
