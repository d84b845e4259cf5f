"""Files that others wrote, read without running anything they hold: the one room to review for security.

`descriptor` opens a file once; `limits` says how large things may be; `zips` and `pickles` read the two containers that
could run code; `containers` and `folders` read checkpoints, `arrays` reads embeddings.
"""
