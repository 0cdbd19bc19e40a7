from endor.cli.tables import table


def test_the_first_column_is_left_and_the_others_right():
    assert table(["", "ms"], [["endor raw", "1.5"], ["x", "20.25"]]).splitlines() == [
        "              ms",
        "---------  -----",
        "endor raw    1.5",
        "x          20.25",
    ]


def test_no_line_ends_in_a_space():
    assert all(
        line == line.rstrip() for line in table(["a", "b"], [["1", ""], ["2", "3"]]).splitlines()
    )
