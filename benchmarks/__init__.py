"""Side-by-side cost of isotune and PEFT: `python -m benchmarks` measures, `python -m benchmarks.render` reports."""
