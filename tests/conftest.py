import pytest
from running import FASHION


@pytest.fixture(scope="session")
def fashion() -> list[str]:
    """Arguments that name the Fashion-MNIST tars, which `make data` prepares."""
    if not (FASHION / "val" / "index.dtx").exists():
        pytest.fail("Fashion-MNIST is not prepared: run make data")
    return [f"--data.train={FASHION / 'train'}", f"--data.val={FASHION / 'val'}"]
