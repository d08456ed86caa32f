"""What is told of compiled graphs: ``explain`` and its report, what crosses ranks, and what memory it takes.

Nothing here changes a graph. The package and its budget import no torch: the command checks arguments first.
"""
