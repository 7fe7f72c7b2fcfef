"""How a skipped law says that the method is exempt from it, so that the summary of a test run can list it."""

EXEMPT = "exempt from a law: "
