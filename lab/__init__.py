import parts  # noqa: F401  before torch
