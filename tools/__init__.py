import runtime.quick_help  # noqa: F401 - --help does not wait for the imports of the commands here
