import kernels.ours  # noqa: F401 - says so where another package replaced kernels/__init__.py
