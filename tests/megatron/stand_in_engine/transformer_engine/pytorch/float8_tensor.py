"""A name that Megatron-Core imports."""


class Float8Tensor:
    """No tensor is one."""
