"""What every test rests on."""

from hypothesis import settings

# No deadline per example: a busy machine would fail what is right. Fixed examples, so that two runs agree.
settings.register_profile("polyserve", deadline=None, derandomize=True)
settings.load_profile("polyserve")
