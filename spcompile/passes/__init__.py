"""All that happens to a graph, from Dynamo to the generated code: each step by its function, in order.

After a function stands its module, in the package that the heading names. docs/how_it_works.md is the guided
tour.

Dynamo's graph, in ``spcompile.passes`` (called by ``spcompile.backend``; ``explain`` does the same)::

    canonicalise          canonical: an order that follows from what is computed; asks ``effects``
    open_boundary         spcompile.boundary: ports where a rank's part may come in and go out
    prepare               spcompile.frontend, which calls
      find                  spcompile.hints: the user's sequence dims, at the graph's inputs
      again                 spcompile.replay: the edit that an earlier start kept, in place of the next two
      _recognized           recognize: attention and recurrences become operators of ours; each is one of
                            ``sites``; reads the graph's ``shadow``, where ``transforms`` are opaque.
                            lengths: where sizes are symbolic, by edits at a few lengths; asks ``numbers``
      split_einsums         einsums: of three operands or more into a chain of two each

The joint graph that AOTAutograd makes of it, in ``spcompile.passes.shard`` (``shard_joint_graph``)::

    specialise            specialise: symbolic numbers are written in, where they are not to stay
    open_ports            ports: what AOTAutograd made of the ports, as the next steps want it
    lend_nothing          ports: at one rank, with the next and ``_erase_dead`` in place of all up to verify
    lower_attention       lower: attention in linear work and memory
    make_empty            nothing: tensors without entries are made where they are
    move_windows          windows: slices and shifts go where they are views
    plan_sequences        sequences: where the sequence is, and how many tokens a rank gets; calls
                          ``propagate``: a placement for every tensor; which asks ``routes`` about sorts
    effects               copies: what must happen once and in order, noted for verify
    gradients_of          gradients: which outputs stay sums over ranks, if any are to
    Localizer             localize: the graph of one rank, emitted in a ``context``; asks ``communicate`` for
                          collectives, ``reorder`` about sorts, ``reach`` for halos, ``copies`` for effects
    gather_again          regather: which keys and values the backward gathers again
    _erase_dead           what was emitted and is not used
    verify                verify: fails where the graph is not what the plan says
    check_outputs         verify: fails where outputs are not as eager's

Its forward and its backward, cut by the partitioner and after Inductor's own passes, in ``spcompile.passes``
(``WaitPass`` in ``spcompile.backend``; ``explain`` ends with the first)::

    erase_dead_waits      overlap: waits that nobody needs
    in_pieces             chunks: the gradient of returned logits, in pieces that ``row_steps`` allows
    close_ports           shard.ports: what is added to a gradient is added in place

Last, Inductor's scheduler orders starts and waits, with the options that ``overlap`` gives it.
"""
