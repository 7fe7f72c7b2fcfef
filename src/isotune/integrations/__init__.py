"""isotune within the tools that people train with, a module each."""
