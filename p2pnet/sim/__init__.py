"""The simulator: the shipped cores by the thousand, in virtual time (docs/simulator.md). Pure.

    world = World(seed=7, links=Links(loss=0.01))      # all times in virtual seconds
    peers = grow(world, 32)                            # they join honestly: run the world
    peers = acquainted(world, 1000, gossip=False)      # or know each other from the start
    world.run_for(30.0)
    took_s = world.run(lambda: ..., limit_s=30.0, every_s=0.02)        # None: it never did
    nodes = peers[3].dht.ask(lambda op: FindNode(op, peer_id, 10.0))   # runs until it is done
    peers[3].dht.start(lambda op: Get(op, key, 10.0), then)            # then(result), later
    peers[5].machine.kill()                            # vanish, pause, resume, starve
    peers[5].machine.restart(keep_disk=False)          # a new process: joins again
    world.links.cut(a.machine, b.machine)              # split(groups), heal(), loss = 0.05
    peers[0].gossip.watchers.append(lambda node, change: ...)          # each MemberChanged
    world.wire.bytes, world.wire.messages, machine.sent_bytes          # what was sent
    world.trace, world.events                          # the hash of all events; how many

A scenario (`scenarios/`) takes nodes, seed and options and returns a `Report`.
"""
