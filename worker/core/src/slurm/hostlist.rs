//! Slurm's lists of hosts: `n[0-3,7],rack[1-2]n[00-15]`. A list is never written out: it may stand for a whole cluster.

/// Most ranges in one name, and digits of a number in one: how a name falls into them is tried out.
const RANGES_MAX: usize = 4;
const DIGITS_MAX: usize = 12;

/// Whether a list holds a name.
pub(super) fn holds(list: &str, name: &str) -> bool {
    list.eq_ignore_ascii_case("ALL") || split(list).any(|pattern| matches(pattern, name))
}

/// Says what is wrong with a list.
pub(super) fn check(list: &str) -> Result<(), String> {
    let wrong = |why: &str| Err(format!("{list:?} is no list of hosts: {why}"));
    let mut open = false;
    for c in list.chars() {
        match c {
            '[' if open => return wrong("a bracket within brackets"),
            ']' if !open => return wrong("a bracket is closed that was not opened"),
            '[' => open = true,
            ']' => open = false,
            _ => {}
        }
    }
    if open {
        return wrong("a bracket is not closed");
    }
    for pattern in split(list) {
        if pattern.is_empty() {
            return wrong("a name is empty");
        }
        let ranges: Vec<&str> =
            pattern.split('[').skip(1).filter_map(|rest| Some(rest.split_once(']')?.0)).collect();
        if ranges.len() > RANGES_MAX {
            return wrong("more than four brackets in a name");
        }
        if let Some(bad) = ranges.iter().flat_map(|all| all.split(',')).find(|one| Range::read(one).is_none())
        {
            return wrong(&format!("{bad:?} is no range"));
        }
    }
    Ok(())
}

/// The names of a list, each with its brackets.
fn split(list: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0_u32;
    list.split(move |c: char| {
        match c {
            '[' => depth += 1,
            ']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ',' && depth == 0
    })
}

fn matches(pattern: &str, name: &str) -> bool {
    if pattern.matches('[').count() > RANGES_MAX {
        return false;
    }
    let Some((prefix, rest)) = pattern.split_once('[') else { return pattern == name };
    let (Some(name), Some((ranges, after))) = (name.strip_prefix(prefix), rest.split_once(']')) else {
        return false;
    };
    let digits = name.bytes().take_while(u8::is_ascii_digit).count().min(DIGITS_MAX);
    // What follows may begin with a digit of its own.
    (1..=digits).any(|len| in_ranges(ranges, &name[..len]) && matches(after, &name[len..]))
}

fn in_ranges(ranges: &str, number: &str) -> bool {
    let Ok(value) = number.parse::<u64>() else { return false };
    ranges.split(',').filter_map(Range::read).any(|range| range.holds(value, number))
}

/// `1`, `01-100`, or with a step `0-14/2`.
#[derive(Clone, Copy)]
struct Range {
    first: u64,
    last: u64,
    step: u64,
    /// Digits that a number has at least, filled up with zeros: those of the first.
    width: usize,
}

impl Range {
    fn read(text: &str) -> Option<Self> {
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            if digits && text.len() <= DIGITS_MAX { text.parse::<u64>().ok() } else { None }
        };
        let (range, step) = text.split_once(['/', ':']).unwrap_or((text, "1"));
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let read = Self {
            first: number(first)?,
            last: number(last)?,
            step: number(step).filter(|step| *step > 0)?,
            width: first.len(),
        };
        (read.first <= read.last).then_some(read)
    }

    fn holds(self, value: u64, written: &str) -> bool {
        (self.first..=self.last).contains(&value)
            && (value - self.first).is_multiple_of(self.step)
            && format!("{value:0width$}", width = self.width) == written
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_slurms() {
        let table = [
            ("a,b", "b", true),
            ("n[0-3,7]", "n7", true),
            ("n[0-3,7]", "n5", false),
            ("n[0-3]", "n03", false),
            ("n[08-10]", "n09", true),
            ("n[08-10]", "n9", false),
            // The width is the least, not the only one.
            ("gpu[01-100]", "gpu07", true),
            ("gpu[01-100]", "gpu100", true),
            ("gpu[01-100]", "gpu7", false),
            ("gpu[01-100]", "gpu007", false),
            ("gpu[1-100]", "gpu100", true),
            ("n[0-14/2]", "n4", true),
            ("n[0-14/2]", "n5", false),
            ("n[1-9:4,20]", "n9", true),
            ("n[001-100/3]", "n004", true),
            ("rack[0-1]n[00-15]", "rack1n07", true),
            ("rack[0-1]n[00-15]", "rack2n07", false),
            ("r[1-2]c[1-3]n[1-9]-ib", "r2c3n9-ib", true),
            ("n[1-2]5", "n15", true),
            ("ALL", "n15", true),
            ("[0-9][0-9][0-9][0-9][0-9]", "12345", false),
        ];
        for (list, name, expected) in table {
            assert_eq!(holds(list, name), expected, "{list} {name}");
        }
    }

    #[test]
    fn what_is_wrong_with_one_is_said() {
        let table = [
            ("n[1-3", "is not closed"),
            ("n]1[", "was not opened"),
            ("n[1-[2]]", "within"),
            ("n[3-1]", "\"3-1\" is no range"),
            ("n[a-c]", "\"a-c\" is no range"),
            ("n[1-9/0]", "is no range"),
            ("n1,,n2", "is empty"),
            ("", "is empty"),
            ("[1][1][1][1][1]", "more than four"),
        ];
        for (list, expected) in table {
            let said = check(list).unwrap_err();
            assert!(said.contains(expected), "{list}: {said}");
        }
        check("n[0-3,7],rack[1-2]n[00-15/5],login").unwrap();
    }
}
