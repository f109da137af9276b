"""The same plan on a machine that is not here: job files for SkyPilot, Slurm and Modal, and what runs them there.

A job file is written from a recipe without ``auto``, so that the run does the plan that was shown, and it is all that
has to be sent. On the machine, :mod:`.attempt` starts the run or goes on with it, and :mod:`.keep` holds a copy of it
where it outlives the machine.
"""
