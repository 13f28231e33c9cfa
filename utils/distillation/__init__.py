"""How a network learns from another one."""
