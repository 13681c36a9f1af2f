//! Dates in the form of answers (UTC) and of chat templates (local time).

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

/// The time in UTC, as `2026-11-22T20:44:31Z`.
pub fn now() -> String {
    written(SystemTime::now())
}

/// A time in the form of [`now`].
pub fn written(time: SystemTime) -> String {
    strftime(utc(time), "%Y-%m-%dT%H:%M:%SZ")
}

/// Seconds since 1970.
pub(crate) fn seconds(time: SystemTime) -> u64 {
    since_1970(time).as_secs()
}

fn since_1970(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// `2026-02-03T04:05:06.789Z`.
pub(crate) fn timestamp(time: SystemTime) -> String {
    let millis = since_1970(time).subsec_millis();
    format!("{}.{millis:03}Z", strftime(utc(time), "%Y-%m-%dT%H:%M:%S"))
}

/// Date and time of day, UTC.
pub(crate) fn utc(time: SystemTime) -> DateTime {
    civil(time, TimeZone::UTC)
}

/// Date and time of day on this machine: in the time zone of the environment variable `TZ`, or the system's.
pub(crate) fn local(time: SystemTime) -> DateTime {
    civil(time, TimeZone::system())
}

fn civil(time: SystemTime, zone: TimeZone) -> DateTime {
    let time = Timestamp::try_from(time).unwrap_or(Timestamp::UNIX_EPOCH);
    time.to_zoned_datetime(zone).datetime()
}

/// The meaning of a letter in a format.
enum DatePart {
    /// A number with at least this many digits, filled up with this character.
    Number(i64, usize, char),
    Text(&'static str),
    /// Another format.
    Format(&'static str),
    /// Six digits, which flags do not change.
    Microseconds,
}

/// The flags between `%` and a letter.
#[derive(Default)]
struct Flags {
    /// `_`, `-` or `0`.
    fill_with: Option<char>,
    uppercase: bool,
    /// `#`: the other case.
    swap: bool,
    width: usize,
}

/// The time as Python's `datetime.strftime` writes one without a time zone, on Linux and in English (glibc's
/// `strftime_l.c`): the flags `_`, `-`, `0`, `^` and `#` and a width are followed, `%z` and `%Z` are empty, and an
/// unknown letter is not replaced.
pub(crate) fn strftime(time: DateTime, format: &str) -> String {
    let mut text = String::new();
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        text.push_str(&rest[..at]);
        let (flags, letter, length) = flags(&rest[at + 1..]);
        let end = at + 1 + length;
        match letter.and_then(|letter| Some((letter, part(time, letter)?))) {
            Some((letter, part)) => text.push_str(&flags.write(time, letter, &part)),
            None => text.push_str(&flags.fill(rest[at..end].to_owned())),
        }
        rest = &rest[end..];
    }
    text + rest
}

/// The flags after a `%`, their letter, and the number of bytes of both.
fn flags(text: &str) -> (Flags, Option<char>, usize) {
    let mut flags = Flags::default();
    let mut letters = text.char_indices().peekable();
    while let Some((_, flag)) = letters.next_if(|(_, letter)| "_-0^#".contains(*letter)) {
        match flag {
            '^' => flags.uppercase = true,
            '#' => flags.swap = true,
            fill => flags.fill_with = Some(fill),
        }
    }
    while let Some((_, digit)) = letters.next_if(|(_, letter)| letter.is_ascii_digit()) {
        let width = flags.width * 10 + digit as usize - '0' as usize;
        flags.width = width.min(MOST);
    }
    // Other forms of dates and digits, which English does not have; they are allowed before some letters only.
    let modified = match letters.next_if(|(_, letter)| matches!(letter, 'E' | 'O')) {
        None => None,
        Some((_, 'E')) => Some("%CPRTXYZcnprtuxyz"),
        Some(_) => Some("%BCGHIMPRSTUVWZbdeghjklmnprstuwyz"),
    };
    match letters.next() {
        Some((at, letter)) => {
            let known = modified.is_none_or(|before| before.contains(letter));
            (flags, Some(letter).filter(|_| known), at + letter.len_utf8())
        }
        None => (flags, None, text.len()),
    }
}

/// Most characters that a width can ask for.
const MOST: usize = 255;

impl Flags {
    fn write(&self, time: DateTime, letter: char, part: &DatePart) -> String {
        let mut text = match part {
            DatePart::Microseconds => return format!("{:06}", time.subsec_nanosecond() / 1000),
            DatePart::Number(number, digits, fill) => {
                let number = number.to_string();
                return match self.fill_with.unwrap_or(*fill) {
                    '-' => number,
                    fill => filled(number, *digits.max(&self.width), if fill == '_' { ' ' } else { fill }),
                };
            }
            DatePart::Text(text) => (*text).to_owned(),
            DatePart::Format(format) => strftime(time, format),
        };
        if self.swap && letter == 'p' {
            text = text.to_lowercase();
        } else if (self.uppercase && letter != 'P')
            || (self.swap && matches!(letter, 'a' | 'A' | 'b' | 'B' | 'h'))
        {
            text = text.to_uppercase();
        }
        self.fill(text)
    }

    fn fill(&self, text: String) -> String {
        filled(text, self.width, if self.fill_with == Some('0') { '0' } else { ' ' })
    }
}

fn filled(text: String, width: usize, fill: char) -> String {
    let missing = width.saturating_sub(text.chars().count());
    std::iter::repeat_n(fill, missing).chain(text.chars()).collect()
}

fn part(time: DateTime, letter: char) -> Option<DatePart> {
    let date = time.date();
    let (hour, week) = (i64::from(time.hour()), date.iso_week_date());
    let weekday = usize::from(date.weekday().to_monday_zero_offset().unsigned_abs());
    let sunday = i64::from(date.weekday().to_sunday_zero_offset());
    let day = i64::from(date.day_of_year());
    let (year, iso_year) = (i64::from(date.year()), i64::from(week.year()));
    let month = MONTHS[usize::from(date.month().unsigned_abs()) - 1];
    let two = |number: i64| DatePart::Number(number, 2, '0');
    let twelve = (hour + 11) % 12 + 1;
    Some(match letter {
        'Y' => DatePart::Number(year, 4, '0'),
        'C' => two(year / 100),
        'y' => two(year % 100),
        'G' => DatePart::Number(iso_year, 4, '0'),
        'g' => two(iso_year % 100),
        'm' => two(date.month().into()),
        'd' => two(date.day().into()),
        'e' => DatePart::Number(date.day().into(), 2, ' '),
        'j' => DatePart::Number(day, 3, '0'),
        'H' => two(hour),
        'k' => DatePart::Number(hour, 2, ' '),
        'I' => two(twelve),
        'l' => DatePart::Number(twelve, 2, ' '),
        'M' => two(time.minute().into()),
        'S' => two(time.second().into()),
        'f' => DatePart::Microseconds,
        's' => DatePart::Number(local_seconds(time), 1, '0'),
        'u' => DatePart::Number(weekday as i64 + 1, 1, '0'),
        'w' => DatePart::Number(sunday, 1, '0'),
        'U' => two((day + 6 - sunday) / 7),
        'W' => two((day + 6 - weekday as i64) / 7),
        'V' => two(week.week().into()),
        'B' => DatePart::Text(month),
        'b' | 'h' => DatePart::Text(&month[..3]),
        'A' => DatePart::Text(DAYS[weekday]),
        'a' => DatePart::Text(&DAYS[weekday][..3]),
        'p' => DatePart::Text(if hour < 12 { "AM" } else { "PM" }),
        'P' => DatePart::Text(if hour < 12 { "am" } else { "pm" }),
        'z' | 'Z' => DatePart::Text(""),
        'n' => DatePart::Text("\n"),
        't' => DatePart::Text("\t"),
        '%' => DatePart::Text("%"),
        'c' => DatePart::Format("%a %b %e %H:%M:%S %Y"),
        'D' | 'x' => DatePart::Format("%m/%d/%y"),
        'F' => DatePart::Format("%Y-%m-%d"),
        'R' => DatePart::Format("%H:%M"),
        'r' => DatePart::Format("%I:%M:%S %p"),
        'T' | 'X' => DatePart::Format("%H:%M:%S"),
        _ => return None,
    })
}

/// Seconds since 1970 of a time in this machine's zone.
fn local_seconds(time: DateTime) -> i64 {
    TimeZone::system().to_zoned_datetime(time).map_or(0, |zoned| zoned.timestamp().as_second())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        // Of `date -u -d @SECONDS +%FT%TZ`.
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_767_225_599, "2025-12-31T23:59:59Z"),
            (1_795_380_271, "2026-11-22T20:44:31Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(written(UNIX_EPOCH + Duration::from_secs(seconds)), expected);
        }
    }

    #[derive(serde::Deserialize)]
    struct Golden {
        cases: Vec<(String, String, String)>,
    }

    #[test]
    fn dates_are_pythons() {
        let golden: Golden = serde_json::from_str(include_str!("../tests/golden/strftime.json")).unwrap();
        assert_eq!(golden.cases.len(), 632);
        let mut wrong = Vec::new();
        for (time, format, expected) in golden.cases {
            let found = strftime(time.parse().unwrap(), &format);
            if found != expected {
                wrong.push(format!("{time} {format:?}: {found:?}, expected {expected:?}"));
            }
        }
        assert!(wrong.is_empty(), "{} dates\n{}", wrong.len(), wrong.join("\n"));
    }

    #[test]
    fn timestamps_are_utc() {
        let at = |millis| UNIX_EPOCH + Duration::from_millis(millis);
        assert_eq!(timestamp(at(1020)), "1970-01-01T00:00:01.020Z");
        assert_eq!(timestamp(at(951_782_400_000)), "2000-02-29T00:00:00.000Z");
        assert_eq!(strftime(utc(at(1_735_689_599_000)), "%c"), "Tue Dec 31 23:59:59 2024");
    }

    /// Prints the local time; the test below runs it in other time zones.
    #[test]
    #[ignore = "run by local_time_follows_tz"]
    fn print_local_time() {
        println!("local {}", strftime(local(SystemTime::now()), "%Y-%m-%d %H:%M %s"));
    }

    #[test]
    fn local_time_follows_tz() {
        // As POSIX has it, west is positive.
        for (zone, hours) in [("UTC0", 0), ("EAST-14", 14), ("WEST11", -11), ("HALF-5:30", 5)] {
            let output = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "calendar::tests::print_local_time", "--ignored", "--nocapture"])
                .env("TZ", zone)
                .output()
                .unwrap();
            let output = String::from_utf8(output.stdout).unwrap();
            let (_, line) = output.split_once("local ").expect(&output);
            let (shown, seconds) = line.lines().next().unwrap().rsplit_once(' ').unwrap();
            let minutes = if zone.ends_with(":30") { 30 } else { 0 };
            let shifted = seconds.parse::<i64>().unwrap() + hours * 3600 + minutes * 60;
            let expected =
                Timestamp::from_second(shifted).unwrap().to_zoned_datetime(TimeZone::UTC).datetime();
            assert_eq!(shown, strftime(expected, "%Y-%m-%d %H:%M"), "{zone}");
            let now = seconds_of(SystemTime::now());
            assert!((now - seconds.parse::<i64>().unwrap()).abs() < 600, "{zone}: {seconds}, now {now}");
        }
    }

    fn seconds_of(time: SystemTime) -> i64 {
        seconds(time) as i64
    }
}
