"""The commands of `diskwright-io`: one file a family, `session.py` what they work on."""
