"""Writes what the committed results say into the documentation.

`python -m benchmarks.proving_ground.page` fills the blocks between `<!-- NAME -->` and
`<!-- end of NAME -->` in the pages from results.json, and draws their picture; `--check` only says
which page is not as it would be.
"""
